"""The configuration of a process: its model, and the reader of file, environment and command line."""
