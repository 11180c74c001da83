"""The service layer of the `workers` plugin."""
