"""The business logic of the `notifications` plugin: recipients, timing, channels, and the outcomes of deliveries."""
