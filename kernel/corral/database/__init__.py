"""Database connections, models, units of work, compiled statements, leases and migrations."""
