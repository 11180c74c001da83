"""The business logic of the `accounts` plugin. Only this package writes the tables of the plugin."""
