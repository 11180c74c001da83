"""The rules of notifications: who is told of what, when, by which channel, and what becomes of the deliveries."""
