"""HTTP of tasks."""
