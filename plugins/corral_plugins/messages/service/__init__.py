"""The business rules for messages. Only the modules in this package write to the plugin's tables."""
