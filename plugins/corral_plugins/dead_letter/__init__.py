"""The dead letter queue."""
