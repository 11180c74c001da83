"""The rules of agents; the only writer of their tables."""
