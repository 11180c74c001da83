"""The configuration of a process: the model, and the reader of file, environment and command line."""
