"""The database tables for messages, receipts, channels, and subscriptions of agents to channels."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model

STATUSES = ("sent", "delivered", "read", "acked", "expired")
"""The statuses of a receipt, from the least to the most advanced."""
OPEN = ("sent", "delivered", "read")
"""The statuses from which a receipt can still be acknowledged or expire."""


class Message(Model):
    """A message. `sender` and `recipient` are `agent:<id>`, `user:<id>` or `channel:<name>`.

    `status` is the least advanced status of the message's receipts. Code that changes a receipt must first lock the
    message's row, and must update `status` afterwards. `reported_expiry` is true after the sender has been notified
    that an acknowledgement is missing.
    """

    visibility = SHARED
    owner_field = "created_by"

    id = IdField(primary_key=True)
    created_at = InstantField()
    created_by = IdField(null=True)
    sender = peewee.CharField(max_length=80)
    sender_agent_id = IdField(null=True)
    sender_user_id = IdField(null=True)
    sender_name = peewee.CharField(max_length=200)
    recipient = peewee.CharField(max_length=80)
    recipient_agent_id = IdField(null=True)
    recipient_user_id = IdField(null=True)
    channel = peewee.CharField(max_length=64, null=True)
    subject = peewee.CharField(max_length=200)
    body = peewee.TextField()
    type = peewee.CharField(max_length=10)
    in_reply_to = IdField(null=True)
    thread_id = IdField()
    correlation: Any = JSONField()
    expires_at = InstantField()
    hops = peewee.IntegerField()
    trust = peewee.CharField(max_length=10)
    status = peewee.CharField(max_length=10, default="sent")
    reported_expiry = peewee.BooleanField(default=False)

    class Meta:
        table_name = "messages_messages"
        indexes = (
            (("created_at", "id"), False),
            (("thread_id", "created_at", "id"), False),
            (("sender", "created_at"), False),
            (("channel", "created_at"), False),
        )


class Receipt(Model):
    """The state of a message for one recipient, which is an agent or a user.

    `due_at` is the time of the next delivery, or null if the message will not be delivered again. After the last
    redelivery, it is the time at which the receipt expires. `rank` is 0 for requests, which are delivered before other
    messages. `lease_id` is the lease under which the message was delivered.
    """

    id = IdField(primary_key=True)
    message_id = IdField(index=True)
    thread_id = IdField()
    agent_id = IdField(null=True)
    user_id = IdField(null=True)
    expects_ack = peewee.BooleanField()
    rank = peewee.SmallIntegerField()
    status = peewee.CharField(max_length=10, default="sent")
    created_at = InstantField()
    expires_at = InstantField()
    due_at = InstantField(null=True)
    delivered_at = InstantField(null=True)
    read_at = InstantField(null=True)
    acked_at = InstantField(null=True)
    result = peewee.CharField(max_length=10, null=True)
    note = peewee.TextField(null=True)
    redeliveries = peewee.IntegerField(default=0)
    lease_id = IdField(null=True)

    class Meta:
        table_name = "messages_receipts"
        indexes = (
            (("agent_id", "created_at", "id"), False),
            (("user_id", "created_at", "id"), False),
            (("thread_id", "agent_id"), False),
        )


class Subscription(Model):
    """The subscription of an agent to a channel."""

    channel = peewee.CharField(max_length=64)
    agent_id = IdField(index=True)

    class Meta:
        table_name = "messages_subscriptions"
        primary_key = peewee.CompositeKey("channel", "agent_id")


class ChannelRow(Model):
    """A channel to which messages were sent."""

    name = peewee.CharField(primary_key=True, max_length=64)
    last_message_at = InstantField(index=True)

    class Meta:
        table_name = "messages_channels"


def _add_partial_index(name: str, *columns: Any, where: str) -> None:
    Receipt.add_index(Receipt.index(*columns, name=f"messages_receipts_{name}", where=SQL(where)))


_add_partial_index("due", Receipt.agent_id, Receipt.due_at, where="due_at IS NOT NULL")
_add_partial_index("given_up", Receipt.due_at, where="due_at IS NOT NULL AND redeliveries >= 5")
_add_partial_index("open", Receipt.expires_at, where="status IN ('sent', 'delivered', 'read')")
_add_partial_index("undelivered", Receipt.status, where="status = 'sent'")
_add_partial_index("lease", Receipt.lease_id, where="lease_id IS NOT NULL")

TABLES: tuple[type[Model], ...] = (Message, Receipt, Subscription, ChannelRow)
