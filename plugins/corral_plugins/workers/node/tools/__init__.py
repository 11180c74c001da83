"""Tools that run on the worker's machine, for agents that a worker was started to allow them to."""
