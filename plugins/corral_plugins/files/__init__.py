"""Files: the inputs and outputs of tasks."""
