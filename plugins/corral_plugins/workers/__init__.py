"""The plugin `workers`: the machines that run agents."""
