"""The clients of the server."""
