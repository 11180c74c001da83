"""Backups of an installation's data, each in one archive that can be restored into SQLite or PostgreSQL."""
