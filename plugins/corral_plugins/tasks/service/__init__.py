"""The rules of tasks; the only writer of their tables."""
