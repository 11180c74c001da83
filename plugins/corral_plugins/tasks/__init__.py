"""Tasks: the work that agents are asked to do, and its results."""
