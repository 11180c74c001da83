"""The database tables for triggers, their history, and the events that absence triggers expect."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField


class Trigger(Model):
    """A trigger.

    `next_slot_at` is the next time at which the trigger is due, and `next_fire_at` is the same time plus jitter.
    Intervals are counted from `since`, which is the last time at which the trigger was due, or the time of its
    creation. Events before `since` do not fire the trigger. `event_key` is the event that fires the trigger, or that an
    absence trigger expects. `event_after` is the event that starts the wait of an absence trigger. Tokens are stored as
    hashes. The previous token and the previous secret remain valid until `old_until`.
    """

    visibility = SHARED
    owner_field = "created_by"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    created_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    name = peewee.CharField(max_length=100)
    description = peewee.TextField(default="")
    type = peewee.CharField(max_length=60)
    config: Any = JSONField()
    action: Any = JSONField()
    filter_expression = peewee.TextField(null=True)
    enabled = peewee.BooleanField(default=True)
    overlap = peewee.CharField(max_length=20)
    catch_up = peewee.CharField(max_length=10)
    catch_up_window_seconds = peewee.IntegerField()
    max_fires_per_hour = peewee.IntegerField()
    since = InstantField()
    next_slot_at = InstantField(null=True)
    next_fire_at = InstantField(null=True)
    last_fire_at = InstantField(null=True)
    last_status = peewee.CharField(max_length=20, null=True)
    consecutive_failures = peewee.IntegerField(default=0)
    disabled_reason = peewee.CharField(max_length=40, null=True)
    event_key = peewee.CharField(max_length=100, null=True)
    event_after = peewee.CharField(max_length=100, null=True)
    token_hash = peewee.CharField(max_length=64, null=True)
    old_token_hash = peewee.CharField(max_length=64, null=True)
    secret = SealedField(null=True)
    old_secret = SealedField(null=True)
    old_until = InstantField(null=True)
    deleted_at = InstantField(null=True)

    class Meta:
        table_name = "triggers_triggers"
        indexes = (
            (("created_at", "id"), False),
            (("created_by",), False),
            (("event_key",), False),
            (("event_after",), False),
            (("token_hash",), True),
            (("old_token_hash",), False),
        )


LIVING = Trigger.deleted_at.is_null()
IS_ENABLED = LIVING & Trigger.enabled
Trigger.add_index(
    Trigger.index(Trigger.next_fire_at, name="triggers_triggers_due", where=Trigger.next_fire_at.is_null(False))
)


class Fire(Model):
    """A row of a trigger's history, which records one slot: a time, an event or a delivery that fires the trigger.

    A trigger can have only one row for each value of `slot`, so each slot fires at most once. A row is `pending` until
    a job has evaluated the filter and run the action. For a pending row, `stage` is the condition for which it waits,
    and `due_at` is the time at which the wait ends. `payload`, `event` and `cause` are kept until the outcome of the
    slot is decided.
    """

    id = IdField(primary_key=True)
    trigger_id = IdField()
    slot = peewee.CharField(max_length=120)
    created_at = InstantField()
    scheduled_for = InstantField()
    fired_at = InstantField(null=True)
    status = peewee.CharField(max_length=20, default="pending")
    stage = peewee.CharField(max_length=12, default="new")
    due_at = InstantField()
    attempt = peewee.IntegerField(default=0)
    reason = peewee.CharField(max_length=200, null=True)
    payload: Any = JSONField(null=True)
    event: Any = JSONField(null=True)
    cause: Any = JSONField(default=list)
    is_manual = peewee.BooleanField(default=False)
    is_tainted = peewee.BooleanField(default=False)
    is_live = peewee.BooleanField(default=False)
    body_sha256 = peewee.CharField(max_length=64, null=True)
    input_preview = peewee.TextField(default="")
    result: Any = JSONField(null=True)
    error = peewee.TextField(null=True)
    duration_ms = peewee.IntegerField(null=True)

    class Meta:
        table_name = "triggers_history"
        indexes = (
            (("trigger_id", "slot"), True),
            (("trigger_id", "created_at", "id"), False),
            (("trigger_id", "status", "fired_at"), False),
            (("created_at", "id"), False),
        )


PENDING = Fire.status == "pending"
Fire.add_index(Fire.index(Fire.due_at, name="triggers_history_pending", where=peewee.SQL("status = 'pending'")))


class Expectation(Model):
    """An event that an absence trigger expects before `due_at`.

    `key` is the value of the field that the trigger's `for_each` names. The trigger waits separately for each value.
    """

    id = IdField(primary_key=True)
    trigger_id = IdField()
    key = peewee.CharField(max_length=200)
    since = InstantField()
    due_at = InstantField(index=True)
    payload: Any = JSONField(null=True)

    class Meta:
        table_name = "triggers_expectations"
        indexes = ((("trigger_id", "key"), True),)


TABLES: tuple[type[Model], ...] = (Trigger, Fire, Expectation)
