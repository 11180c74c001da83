"""The HTTP routes of tasks."""
