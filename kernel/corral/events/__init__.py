"""The event log (outbox), its live feed, durable consumers, and notifications between processes."""
