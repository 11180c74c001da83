"""The HTTP routes for tasks."""
