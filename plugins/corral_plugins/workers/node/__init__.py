"""The reference worker, a program that uses only the server's public HTTP API."""
