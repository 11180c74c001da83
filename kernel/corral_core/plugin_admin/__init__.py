"""The plugin `plugin_admin`: administration of plugins, and the API documentation."""
