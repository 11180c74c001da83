"""Backups: one archive with all data of an installation, for either database engine."""
