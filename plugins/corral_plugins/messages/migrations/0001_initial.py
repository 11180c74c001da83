"""Creates the tables for messages, receipts, subscriptions and channels."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL, BooleanField, CharField, IntegerField, SmallIntegerField, TextField


def up(migrator: Any, db: Any) -> None:
    class Message(peewee.Model):
        id = CharField(max_length=36, primary_key=True)
        created_at = CharField(max_length=24)
        created_by = CharField(max_length=36, null=True)
        sender = CharField(max_length=80)
        sender_agent_id = CharField(max_length=36, null=True)
        sender_user_id = CharField(max_length=36, null=True)
        sender_name = CharField(max_length=200)
        recipient = CharField(max_length=80)
        recipient_agent_id = CharField(max_length=36, null=True)
        recipient_user_id = CharField(max_length=36, null=True)
        channel = CharField(max_length=64, null=True)
        subject = CharField(max_length=200)
        body = TextField()
        type = CharField(max_length=10)
        in_reply_to = CharField(max_length=36, null=True)
        thread_id = CharField(max_length=36)
        correlation = TextField()
        expires_at = CharField(max_length=24)
        hops = IntegerField()
        trust = CharField(max_length=10)
        status = CharField(max_length=10)
        reported_expiry = BooleanField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "messages_messages"
            indexes = (
                (("created_at", "id"), False),
                (("thread_id", "created_at", "id"), False),
                (("sender", "created_at"), False),
                (("channel", "created_at"), False),
            )

    class Receipt(peewee.Model):
        id = CharField(max_length=36, primary_key=True)
        message_id = CharField(max_length=36, index=True)
        thread_id = CharField(max_length=36)
        agent_id = CharField(max_length=36, null=True)
        user_id = CharField(max_length=36, null=True)
        expects_ack = BooleanField()
        rank = SmallIntegerField()
        status = CharField(max_length=10)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24)
        due_at = CharField(max_length=24, null=True)
        delivered_at = CharField(max_length=24, null=True)
        read_at = CharField(max_length=24, null=True)
        acked_at = CharField(max_length=24, null=True)
        result = CharField(max_length=10, null=True)
        note = TextField(null=True)
        redeliveries = IntegerField()
        lease_id = CharField(max_length=36, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "messages_receipts"
            indexes = (
                (("agent_id", "created_at", "id"), False),
                (("user_id", "created_at", "id"), False),
                (("thread_id", "agent_id"), False),
            )

    for name, columns, where in (
        ("due", (Receipt.agent_id, Receipt.due_at), "due_at IS NOT NULL"),
        ("given_up", (Receipt.due_at,), "due_at IS NOT NULL AND redeliveries >= 5"),
        ("open", (Receipt.expires_at,), "status IN ('sent', 'delivered', 'read')"),
        ("undelivered", (Receipt.status,), "status = 'sent'"),
        ("lease", (Receipt.lease_id,), "lease_id IS NOT NULL"),
    ):
        Receipt.add_index(Receipt.index(*columns, name=f"messages_receipts_{name}", where=SQL(where)))

    class Subscription(peewee.Model):
        channel = CharField(max_length=64)
        agent_id = CharField(max_length=36, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "messages_subscriptions"
            primary_key = peewee.CompositeKey("channel", "agent_id")

    class ChannelRow(peewee.Model):
        name = CharField(primary_key=True, max_length=64)
        last_message_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "messages_channels"

    db.create_tables([Message, Receipt, Subscription, ChannelRow])
