"""The business logic of the plugin `accounts`. Only this package writes the tables of the plugin."""
