"""The HTTP routes of the plugin `health`, with one handler function per endpoint."""
