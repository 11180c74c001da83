"""Credentials in one place: encrypted, versioned, used by name."""
