"""The HTTP routes of workflows and their runs."""
