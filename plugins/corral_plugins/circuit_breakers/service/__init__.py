"""The business logic for circuit breakers."""
