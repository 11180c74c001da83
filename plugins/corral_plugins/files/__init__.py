"""Files, which are the inputs and outputs of tasks."""
