"""The service layer of tools."""
