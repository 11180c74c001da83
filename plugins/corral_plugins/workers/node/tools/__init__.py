"""Tools that run on the worker's machine."""
