"""The HTTP routes of the plugin `security`."""
