"""The business rules for code reviews."""
