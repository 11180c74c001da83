"""The business rules of code reviews."""
