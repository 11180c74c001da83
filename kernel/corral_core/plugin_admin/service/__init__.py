"""The business logic of the `plugin_admin` plugin. Only this package writes the tables of the plugin."""
