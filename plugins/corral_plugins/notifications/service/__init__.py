"""The business logic of notifications: recipients, timing, channels, and the outcome of deliveries."""
