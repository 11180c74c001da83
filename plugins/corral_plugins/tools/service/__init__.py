"""The rules of tools."""
