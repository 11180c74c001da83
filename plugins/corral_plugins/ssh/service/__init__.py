"""The business rules of SSH connections."""
