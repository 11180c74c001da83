"""Tasks: units of work for agents, and their results."""
