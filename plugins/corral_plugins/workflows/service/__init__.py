"""The business rules of workflows."""
