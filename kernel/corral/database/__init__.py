"""Connections, models, the unit of work, compiled statements, pages, leases and migrations."""
