"""The event log (outbox), its live feed, durable consumers and the bell between processes."""
