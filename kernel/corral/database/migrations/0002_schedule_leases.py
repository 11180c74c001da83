"""Schedules have a lease while they run, so that no two processes can hold the same one."""

from __future__ import annotations

from peewee import CharField


def up(migrator, db):
    migrator.migrate(migrator.add_column("kernel_schedules", "lease", CharField(max_length=36, null=True)))
