"""The configuration of one process: its shape, and how files, variables and options become it."""
