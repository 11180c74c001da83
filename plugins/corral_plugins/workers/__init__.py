"""Workers: the machines that run agents."""
