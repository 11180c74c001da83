"""The rules of circuit breakers."""
