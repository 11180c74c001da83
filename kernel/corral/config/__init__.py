"""The configuration of a process: its keys and types, and the code that reads and validates the values."""
