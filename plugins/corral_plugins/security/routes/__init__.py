"""The HTTP routes of this plugin."""
