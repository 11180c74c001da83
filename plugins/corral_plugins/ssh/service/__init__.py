"""The rules of SSH connections."""
