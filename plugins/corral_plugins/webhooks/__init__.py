"""The `webhooks` plugin: signed deliveries of events to the systems of users."""
