"""The business logic of the `dead_letter` plugin. Only this package writes to the plugin's tables."""
