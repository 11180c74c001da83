"""The service layer of the plugin `workers`."""
