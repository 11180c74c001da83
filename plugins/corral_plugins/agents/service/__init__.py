"""The business rules of agents. Only the modules in this package write to the plugin's tables."""
