"""The `event_log` plugin: reading and retention of the event log."""
