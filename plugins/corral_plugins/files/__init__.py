"""Files: inputs of tasks and what comes out of them."""
