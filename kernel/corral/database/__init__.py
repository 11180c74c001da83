"""Connections, models, units of work, compiled statements, leases and migrations."""
