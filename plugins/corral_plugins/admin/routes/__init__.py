"""The HTTP routes of administration."""
