"""The rules of triggers."""
