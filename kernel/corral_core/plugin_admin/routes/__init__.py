"""The HTTP routes of the `plugin_admin` plugin, with one handler function per endpoint."""
