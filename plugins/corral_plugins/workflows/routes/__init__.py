"""The HTTP routes of workflows and of their runs."""
