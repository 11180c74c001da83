"""The HTTP routes for workflows and their runs."""
