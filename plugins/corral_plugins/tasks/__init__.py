"""Tasks: what agents are asked to do, and how it went."""
