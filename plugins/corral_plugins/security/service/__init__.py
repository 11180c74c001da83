"""The rules of security."""
