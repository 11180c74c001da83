"""The business logic of this plugin. Only this package writes the plugin's tables."""
