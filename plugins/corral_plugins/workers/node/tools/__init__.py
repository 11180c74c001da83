"""The tools that run on the worker's machine."""
