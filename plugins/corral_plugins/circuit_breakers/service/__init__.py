"""The business logic of circuit breakers."""
