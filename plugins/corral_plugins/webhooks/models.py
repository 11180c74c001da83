"""The database tables for webhooks, their event subscriptions, and their deliveries."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField


class Webhook(Model):
    """A webhook.

    `since_seq` is the end of the event log at the time when the webhook was created or enabled. Only later events are
    delivered. Until `old_until`, messages are signed with `old_secret` in addition to `secret`. `headers` is an
    encrypted JSON object. `failures` is the number of failed attempts since `failing_since`. `claimed_at` is the time
    at which a delivery to the webhook was last claimed, which determines the order in which webhooks are served.
    `recovering_at` is the time at which an unfinished recovery began.
    """

    visibility = PRIVATE
    owner_field = "user_id"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    user_id = IdField()
    created_at = InstantField()
    updated_at = InstantField()
    url = peewee.CharField(max_length=2048)
    host = peewee.CharField(max_length=255)
    events: Any = JSONField()
    description = peewee.TextField(default="")
    filter: Any = JSONField(null=True)
    secret = SealedField()
    old_secret = SealedField(null=True)
    old_until = InstantField(null=True)
    headers = SealedField(null=True)
    header_names: Any = JSONField(default=list)
    is_active = peewee.BooleanField(default=True)
    disabled_reason = peewee.CharField(max_length=20, null=True)
    since_seq = peewee.BigIntegerField(default=0)
    failing_since = InstantField(null=True)
    failures = peewee.IntegerField(default=0)
    next_probe_at = InstantField(null=True)
    last_success_at = InstantField(null=True)
    last_status_code = peewee.IntegerField(null=True)
    claimed_at = InstantField()
    recovering_at = InstantField(null=True)

    class Meta:
        table_name = "webhooks_webhooks"
        indexes = ((("user_id", "created_at", "id"), False), (("created_at", "id"), False))


Webhook.add_index(
    Webhook.index(Webhook.next_probe_at, name="webhooks_webhooks_probes", where=Webhook.next_probe_at.is_null(False))
)


class Subscription(Model):
    """The name of an event that a webhook subscribes to, or a pattern such as `task.*` or `*`."""

    webhook_id = IdField()
    pattern = peewee.CharField(max_length=100)

    class Meta:
        table_name = "webhooks_subscriptions"
        primary_key = peewee.CompositeKey("pattern", "webhook_id")
        indexes = ((("webhook_id",), False),)


class Delivery(Model):
    """The delivery of an event to a webhook. `id` is the message id, which is the same in all attempts.

    While the delivery waits, `due_at` equals `next_attempt_at`, which is the time that users see. Otherwise, `due_at`
    is null. While an attempt runs, `lease` is its fencing token, and the process must record the result before
    `lease_until`. `subject` determines who may read the event. `attempts` contains the most recent attempts. `tries` is
    the number of all attempts, and `attempt` is the number of those that belong to the retry schedule. `error` and
    `status_code` describe the last attempt.
    """

    id = IdField(primary_key=True)
    webhook_id = IdField()
    event_id = IdField()
    event = peewee.CharField(max_length=100)
    subject: Any = JSONField()
    payload = peewee.TextField()
    status = peewee.CharField(max_length=10, default="pending")
    attempt = peewee.IntegerField(default=0)
    tries = peewee.IntegerField(default=0)
    attempts: Any = JSONField(default=list)
    error = peewee.CharField(max_length=20, null=True)
    status_code = peewee.IntegerField(null=True)
    next_attempt_at = InstantField(null=True)
    due_at = InstantField(null=True)
    lease = IdField(null=True)
    lease_until = InstantField(null=True)
    created_at = InstantField()
    finished_at = InstantField(null=True, index=True)

    class Meta:
        table_name = "webhooks_deliveries"
        indexes = (
            (("webhook_id", "event_id"), True),
            (("webhook_id", "created_at", "id"), False),
            (("status", "webhook_id"), False),
        )


OPEN = ("pending", "retrying")
IS_OPEN = Delivery.status.in_(OPEN)
for _name, _fields, _where in (
    ("webhooks_deliveries_due", (Delivery.due_at,), Delivery.due_at),
    ("webhooks_deliveries_waiting", (Delivery.webhook_id, Delivery.due_at, Delivery.id), Delivery.due_at),
    ("webhooks_deliveries_leased", (Delivery.lease_until,), Delivery.lease_until),
):
    Delivery.add_index(Delivery.index(*_fields, name=_name, where=_where.is_null(False)))

TABLES: tuple[type[Model], ...] = (Webhook, Subscription, Delivery)
