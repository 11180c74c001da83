"""The rules of workflows."""
