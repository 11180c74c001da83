"""The business logic of the `health` plugin. Only this package writes the tables of the plugin."""
