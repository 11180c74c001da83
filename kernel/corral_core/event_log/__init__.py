"""The `event_log` plugin: access to the event log, and its retention."""
