"""The rules of notifications: who is notified of which events, when and by which channel, and how deliveries end."""
