"""The HTTP routes of the `health` plugin, with one handler function per endpoint."""
