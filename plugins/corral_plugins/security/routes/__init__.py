"""The HTTP routes of the `security` plugin."""
