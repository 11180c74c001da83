"""The business logic of the `plugin_admin` plugin. Only this package writes to the plugin's tables."""
