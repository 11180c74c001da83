"""The HTTP routes of the `accounts` plugin, with one handler function per endpoint."""
