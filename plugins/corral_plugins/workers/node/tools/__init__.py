"""The tools that run on the machine of the worker."""
