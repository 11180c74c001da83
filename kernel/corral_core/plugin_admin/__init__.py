"""The `plugin_admin` plugin: administration of plugins, and the API documentation."""
