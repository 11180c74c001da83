"""Creates the tables for notifications, channels, rules, preferences, and deliveries."""

from __future__ import annotations

from typing import Any

from peewee import BigIntegerField, BooleanField, CharField, CompositeKey, IntegerField, Model, ModelIndex, TextField


def up(migrator: Any, db: Any) -> None:
    _create_what_people_see(db)
    _create_channels_and_rules(db)
    _create_deliveries(db)


def _create_what_people_see(db: Any) -> None:
    class Notification(Model):
        id = CharField(primary_key=True, max_length=36)
        user_id = CharField(max_length=36)
        type = CharField(max_length=100)
        severity = CharField(max_length=10)
        title = CharField(max_length=200)
        body = TextField()
        object_type = CharField(max_length=60, null=True)
        object_id = CharField(max_length=80, null=True)
        href = CharField(max_length=300, null=True)
        event_id = CharField(max_length=36, null=True)
        group_key = CharField(max_length=64)
        count = IntegerField()
        read_at = CharField(max_length=24, null=True)
        created_at = CharField(max_length=24)
        last_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_notifications"
            indexes = (
                (("user_id", "created_at", "id"), False),
                (("user_id", "read_at", "created_at"), False),
                (("user_id", "group_key", "created_at"), False),
                (("created_at",), False),
            )

    class Preference(Model):
        user_id = CharField(primary_key=True, max_length=36)
        mute = TextField()
        email = CharField(max_length=10)
        quiet_hours = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_preferences"

    db.create_tables([Notification, Preference])


def _create_channels_and_rules(db: Any) -> None:
    class Channel(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        name = CharField(max_length=100, unique=True)
        type = CharField(max_length=60)
        config = TextField()
        secrets = TextField(null=True)
        secret_names = TextField()
        is_enabled = BooleanField()
        last_success_at = CharField(max_length=24, null=True)
        last_error = TextField(null=True)
        failing_since = CharField(max_length=24, null=True)
        next_send_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_channels"
            indexes = ((("created_at", "id"), False),)

    class Rule(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        name = CharField(max_length=100, unique=True)
        events = TextField()
        conditions = TextField(null=True)
        min_severity = CharField(max_length=10)
        recipients = TextField()
        channel_ids = TextField()
        in_app = BooleanField()
        enabled = BooleanField()
        group_by = TextField()
        group_wait_seconds = IntegerField()
        group_interval_seconds = IntegerField()
        repeat_interval_seconds = IntegerField()
        quiet_hours = TextField(null=True)
        since_seq = BigIntegerField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_rules"
            indexes = ((("created_at", "id"), False),)

    class RuleChannel(Model):
        channel_id = CharField(max_length=36)
        rule_id = CharField(max_length=36)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_rule_channels"
            primary_key = CompositeKey("channel_id", "rule_id")
            indexes = ((("rule_id",), False),)

    db.create_tables([Channel, Rule, RuleChannel])


def _create_deliveries(db: Any) -> None:
    class Group(Model):
        id = CharField(primary_key=True, max_length=64)
        last_sent_at = CharField(max_length=24, index=True)
        objects = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_groups"

    class Delivery(Model):
        id = CharField(primary_key=True, max_length=36)
        channel_id = CharField(max_length=36)
        rule_id = CharField(max_length=36, null=True)
        group_id = CharField(max_length=64, null=True)
        group_key = CharField(max_length=200)
        user_id = CharField(max_length=36, null=True)
        severity = CharField(max_length=10)
        count = IntegerField()
        items = TextField()
        objects = TextField(null=True)
        status = CharField(max_length=10)
        is_collecting = BooleanField()
        attempts = IntegerField()
        last_error = TextField(null=True)
        served = TextField()
        next_attempt_at = CharField(max_length=24, null=True)
        due_at = CharField(max_length=24, null=True)
        ready_at = CharField(max_length=24, null=True)
        lease = CharField(max_length=36, null=True)
        lease_until = CharField(max_length=24, null=True)
        created_at = CharField(max_length=24)
        finished_at = CharField(max_length=24, null=True, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_deliveries"
            indexes = (
                (("created_at", "id"), False),
                (("channel_id", "created_at", "id"), False),
                (("rule_id", "created_at", "id"), False),
            )

    db.create_tables([Group, Delivery])
    waiting, leased = Delivery.due_at.is_null(False), Delivery.lease_until.is_null(False)
    for name, fields, where in (
        ("notifications_deliveries_due", (Delivery.channel_id, Delivery.due_at, Delivery.id), waiting),
        ("notifications_deliveries_leased", (Delivery.lease_until,), leased),
        ("notifications_deliveries_groups", (Delivery.group_id, Delivery.due_at), waiting),
    ):
        db.execute(ModelIndex(Delivery, fields, where=where, name=name))
