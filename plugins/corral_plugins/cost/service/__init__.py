"""The rules of costs."""
