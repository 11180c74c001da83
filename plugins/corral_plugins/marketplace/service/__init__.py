"""The rules of the marketplace."""
