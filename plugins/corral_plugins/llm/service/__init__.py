"""The rules of the gateway."""
