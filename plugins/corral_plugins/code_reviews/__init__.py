"""Code reviews: people read diffs of agents, comment on lines, and decide on exactly what they have read."""
