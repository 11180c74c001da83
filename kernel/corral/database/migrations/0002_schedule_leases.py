"""Adds a lease to schedules, so that no two processes run the same schedule at the same time."""

from __future__ import annotations

from peewee import CharField


def up(migrator, db):
    migrator.migrate(migrator.add_column("kernel_schedules", "lease", CharField(max_length=36, null=True)))
