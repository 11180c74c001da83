"""Backups of all data of an installation in one archive, for either database engine."""
