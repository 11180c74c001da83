"""The business rules of the plugin."""
