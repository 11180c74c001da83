"""The configuration of a process: the model, and the reader of the file, the environment and the command line."""
