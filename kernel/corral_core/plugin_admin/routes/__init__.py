"""The HTTP routes of the plugin `plugin_admin`, with one handler function per endpoint."""
