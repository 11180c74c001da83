"""The business rules for SSH connections."""
