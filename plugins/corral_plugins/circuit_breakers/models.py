"""The tables for circuit breakers."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import IdField, InstantField, JSONField, Model


class BreakerRow(Model):
    """A circuit breaker, whose state all processes share.

    `config` contains the fields that an admin has configured, or null. `version` increases with each change by an
    admin, and `generation` with each transition. `revision` increases with every change to the row, so that all
    processes notice the change. The first revision is the creation time in milliseconds, so that a new row never looks
    older than a deleted one. `window` contains the counted calls in the format of `window_shape`. `opened_at` is the
    time at which the breaker last left the closed state. The `probe_` columns count the probes of the current half-open
    phase.
    """

    name = peewee.CharField(primary_key=True, max_length=100)
    description = peewee.TextField(default="")
    config: Any = JSONField(null=True)
    version = peewee.IntegerField(default=1)
    state: Any = peewee.CharField(max_length=10, default="closed")
    forced = peewee.BooleanField(default=False)
    generation = peewee.IntegerField(default=1)
    revision = peewee.BigIntegerField()
    opened_at = InstantField(null=True)
    retry_at = InstantField(null=True)
    half_open_until = InstantField(null=True)
    reason = peewee.TextField(default="")
    window = peewee.TextField(default="")
    window_shape = peewee.CharField(max_length=20, default="")
    rejected = peewee.IntegerField(default=0)
    neutral = peewee.IntegerField(default=0)
    permits_out = peewee.IntegerField(default=0)
    probe_calls = peewee.IntegerField(default=0)
    probe_failures = peewee.IntegerField(default=0)
    probe_slow = peewee.IntegerField(default=0)
    last_error: Any = JSONField(null=True)
    alerted = peewee.BooleanField(default=False)

    class Meta:
        table_name = "circuit_breakers_breakers"
        indexes = ((("state", "name"), False),)


class PermitRow(Model):
    """A permit for a probe of a half-open circuit breaker.

    The process that runs the probe renews the permit until the call ends.
    """

    id = IdField(primary_key=True)
    name = peewee.CharField(max_length=100, index=True)
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "circuit_breakers_permits"


class TransitionRow(Model):
    """A transition of a circuit breaker. `by` is the id of the user or API key that caused it, or null."""

    id = IdField(primary_key=True)
    name = peewee.CharField(max_length=100)
    from_state: Any = peewee.CharField(max_length=10)
    to_state: Any = peewee.CharField(max_length=10)
    reason = peewee.TextField()
    by = peewee.CharField(max_length=80, null=True)
    counts: Any = JSONField()
    at = InstantField(index=True)

    class Meta:
        table_name = "circuit_breakers_transitions"
        indexes = ((("name", "id"), False),)


TABLES: tuple[type[Model], ...] = (BreakerRow, PermitRow, TransitionRow)
