"""The reference worker, a program that uses only the public HTTP API of the server."""
