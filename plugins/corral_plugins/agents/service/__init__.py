"""The business rules for agents. Only the modules in this package write to the plugin's tables."""
