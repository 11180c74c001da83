"""Tasks: pieces of work for agents, and their results."""
