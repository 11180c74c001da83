"""The business logic of the `accounts` plugin. Only this package writes to the plugin's tables."""
