"""The business logic of the plugin `health`. Only this package writes the tables of the plugin."""
