"""The HTTP routes of the plugin `accounts`, with one handler function per endpoint."""
