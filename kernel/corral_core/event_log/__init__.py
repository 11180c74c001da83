"""The plugin `event_log`: reading and retention of the event log."""
