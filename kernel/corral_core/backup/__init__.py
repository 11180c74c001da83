"""Backups of all data of an installation in one archive, which can be restored into SQLite or PostgreSQL."""
