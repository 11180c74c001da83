"""Creates the tables for triggers, their history, and the events that absence triggers expect."""

from __future__ import annotations

from typing import Any

from peewee import SQL, BooleanField, CharField, IntegerField, Model, ModelIndex, TextField


def up(migrator: Any, db: Any) -> None:
    class Trigger(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        name = CharField(max_length=100)
        description = TextField()
        type = CharField(max_length=60)
        config = TextField()
        action = TextField()
        filter_expression = TextField(null=True)
        enabled = BooleanField()
        overlap = CharField(max_length=20)
        catch_up = CharField(max_length=10)
        catch_up_window_seconds = IntegerField()
        max_fires_per_hour = IntegerField()
        since = CharField(max_length=24)
        next_slot_at = CharField(max_length=24, null=True)
        next_fire_at = CharField(max_length=24, null=True)
        last_fire_at = CharField(max_length=24, null=True)
        last_status = CharField(max_length=20, null=True)
        consecutive_failures = IntegerField()
        disabled_reason = CharField(max_length=40, null=True)
        event_key = CharField(max_length=100, null=True)
        event_after = CharField(max_length=100, null=True)
        token_hash = CharField(max_length=64, null=True)
        old_token_hash = CharField(max_length=64, null=True)
        secret = TextField(null=True)
        old_secret = TextField(null=True)
        old_until = CharField(max_length=24, null=True)
        deleted_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "triggers_triggers"
            indexes = (
                (("created_at", "id"), False),
                (("created_by",), False),
                (("event_key",), False),
                (("event_after",), False),
                (("token_hash",), True),
                (("old_token_hash",), False),
            )

    class Fire(Model):
        id = CharField(primary_key=True, max_length=36)
        trigger_id = CharField(max_length=36)
        slot = CharField(max_length=120)
        created_at = CharField(max_length=24)
        scheduled_for = CharField(max_length=24)
        fired_at = CharField(max_length=24, null=True)
        status = CharField(max_length=20)
        stage = CharField(max_length=12)
        due_at = CharField(max_length=24)
        attempt = IntegerField()
        reason = CharField(max_length=200, null=True)
        payload = TextField(null=True)
        event = TextField(null=True)
        cause = TextField()
        is_manual = BooleanField()
        is_tainted = BooleanField()
        is_live = BooleanField()
        body_sha256 = CharField(max_length=64, null=True)
        input_preview = TextField()
        result = TextField(null=True)
        error = TextField(null=True)
        duration_ms = IntegerField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "triggers_history"
            indexes = (
                (("trigger_id", "slot"), True),
                (("trigger_id", "created_at", "id"), False),
                (("trigger_id", "status", "fired_at"), False),
                (("created_at", "id"), False),
            )

    class Expectation(Model):
        id = CharField(primary_key=True, max_length=36)
        trigger_id = CharField(max_length=36)
        key = CharField(max_length=200)
        since = CharField(max_length=24)
        due_at = CharField(max_length=24, index=True)
        payload = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "triggers_expectations"
            indexes = ((("trigger_id", "key"), True),)

    db.create_tables([Trigger, Fire, Expectation])
    due = Trigger.next_fire_at.is_null(False)
    db.execute(ModelIndex(Trigger, (Trigger.next_fire_at,), where=due, name="triggers_triggers_due"))
    pending = SQL("status = 'pending'")
    db.execute(ModelIndex(Fire, (Fire.due_at,), where=pending, name="triggers_history_pending"))
