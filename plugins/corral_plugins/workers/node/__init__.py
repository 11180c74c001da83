"""The reference worker: a program that speaks only the public HTTP API."""
