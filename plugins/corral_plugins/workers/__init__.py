"""The `workers` plugin: the machines that run agents."""
