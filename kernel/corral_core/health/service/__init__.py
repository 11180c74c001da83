"""The business logic of the `health` plugin. Only this package writes to the plugin's tables."""
