"""The business rules of triggers."""
