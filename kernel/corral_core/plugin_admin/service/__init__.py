"""The business logic of the plugin `plugin_admin`. Only this package writes the tables of the plugin."""
