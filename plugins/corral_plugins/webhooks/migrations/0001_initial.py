"""Creates the tables for webhooks, their event subscriptions, and their deliveries."""

from __future__ import annotations

from typing import Any

from peewee import BigIntegerField, BooleanField, CharField, CompositeKey, IntegerField, Model, ModelIndex, TextField


def up(migrator: Any, db: Any) -> None:
    class Webhook(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        user_id = CharField(max_length=36)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        url = CharField(max_length=2048)
        host = CharField(max_length=255)
        events = TextField()
        description = TextField()
        filter = TextField(null=True)
        secret = TextField()
        old_secret = TextField(null=True)
        old_until = CharField(max_length=24, null=True)
        headers = TextField(null=True)
        header_names = TextField()
        is_active = BooleanField()
        disabled_reason = CharField(max_length=20, null=True)
        since_seq = BigIntegerField()
        failing_since = CharField(max_length=24, null=True)
        failures = IntegerField()
        next_probe_at = CharField(max_length=24, null=True)
        last_success_at = CharField(max_length=24, null=True)
        last_status_code = IntegerField(null=True)
        claimed_at = CharField(max_length=24)
        recovering_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "webhooks_webhooks"
            indexes = ((("user_id", "created_at", "id"), False), (("created_at", "id"), False))

    class Subscription(Model):
        webhook_id = CharField(max_length=36)
        pattern = CharField(max_length=100)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "webhooks_subscriptions"
            primary_key = CompositeKey("pattern", "webhook_id")
            indexes = ((("webhook_id",), False),)

    class Delivery(Model):
        id = CharField(primary_key=True, max_length=36)
        webhook_id = CharField(max_length=36)
        event_id = CharField(max_length=36)
        event = CharField(max_length=100)
        subject = TextField()
        payload = TextField()
        status = CharField(max_length=10)
        attempt = IntegerField()
        tries = IntegerField()
        attempts = TextField()
        error = CharField(max_length=20, null=True)
        status_code = IntegerField(null=True)
        next_attempt_at = CharField(max_length=24, null=True)
        due_at = CharField(max_length=24, null=True)
        lease = CharField(max_length=36, null=True)
        lease_until = CharField(max_length=24, null=True)
        created_at = CharField(max_length=24)
        finished_at = CharField(max_length=24, null=True, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "webhooks_deliveries"
            indexes = (
                (("webhook_id", "event_id"), True),
                (("webhook_id", "created_at", "id"), False),
                (("status", "webhook_id"), False),
            )

    db.create_tables([Webhook, Subscription, Delivery])
    probed = Webhook.next_probe_at.is_null(False)
    db.execute(ModelIndex(Webhook, (Webhook.next_probe_at,), where=probed, name="webhooks_webhooks_probes"))
    waiting, leased = Delivery.due_at.is_null(False), Delivery.lease_until.is_null(False)
    for name, fields, where in (
        ("webhooks_deliveries_due", (Delivery.due_at,), waiting),
        ("webhooks_deliveries_waiting", (Delivery.webhook_id, Delivery.due_at, Delivery.id), waiting),
        ("webhooks_deliveries_leased", (Delivery.lease_until,), leased),
    ):
        db.execute(ModelIndex(Delivery, fields, where=where, name=name))
