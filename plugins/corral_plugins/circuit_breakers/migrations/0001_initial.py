"""Create the tables for circuit breakers."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Create the tables and their indexes."""

    class BreakerRow(peewee.Model):
        name = peewee.CharField(primary_key=True, max_length=100)
        description = peewee.TextField()
        config = peewee.TextField(null=True)
        version = peewee.IntegerField()
        state = peewee.CharField(max_length=10)
        forced = peewee.BooleanField()
        generation = peewee.IntegerField()
        revision = peewee.BigIntegerField()
        opened_at = peewee.CharField(max_length=24, null=True)
        retry_at = peewee.CharField(max_length=24, null=True)
        half_open_until = peewee.CharField(max_length=24, null=True)
        reason = peewee.TextField()
        window = peewee.TextField()
        window_shape = peewee.CharField(max_length=20)
        rejected = peewee.IntegerField()
        neutral = peewee.IntegerField()
        permits_out = peewee.IntegerField()
        probe_calls = peewee.IntegerField()
        probe_failures = peewee.IntegerField()
        probe_slow = peewee.IntegerField()
        last_error = peewee.TextField(null=True)
        alerted = peewee.BooleanField()

        class Meta:
            database = db
            table_name = "circuit_breakers_breakers"
            legacy_table_names = False
            indexes = ((("state", "name"), False),)

    class PermitRow(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        name = peewee.CharField(max_length=100, index=True)
        expires_at = peewee.CharField(max_length=24, index=True)

        class Meta:
            database = db
            table_name = "circuit_breakers_permits"
            legacy_table_names = False

    class TransitionRow(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        name = peewee.CharField(max_length=100)
        from_state = peewee.CharField(max_length=10)
        to_state = peewee.CharField(max_length=10)
        reason = peewee.TextField()
        by = peewee.CharField(max_length=80, null=True)
        counts = peewee.TextField()
        at = peewee.CharField(max_length=24, index=True)

        class Meta:
            database = db
            table_name = "circuit_breakers_transitions"
            legacy_table_names = False
            indexes = ((("name", "id"), False),)

    db.create_tables([BreakerRow, PermitRow, TransitionRow])
