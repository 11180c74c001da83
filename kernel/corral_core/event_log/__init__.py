"""Reading and retention of the event log."""
