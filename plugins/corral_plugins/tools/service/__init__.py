"""The service layer of the `tools` plugin."""
