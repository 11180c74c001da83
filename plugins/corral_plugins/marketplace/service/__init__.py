"""The business rules of the marketplace."""
