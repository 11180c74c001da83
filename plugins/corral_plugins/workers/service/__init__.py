"""The service layer of workers."""
