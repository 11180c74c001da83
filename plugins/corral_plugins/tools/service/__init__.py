"""The service layer of the plugin `tools`."""
