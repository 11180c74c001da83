"""The database tables for notifications, channels, rules, preferences, and deliveries."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import ADMIN, PRIVATE, IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField


class Notification(Model):
    """A person's notification in the app. `last_at` is the time of the latest event in the notification.

    `title` is the title of the latest event, and `titles` are the first distinct titles of all its events.
    """

    visibility = PRIVATE
    owner_field = "user_id"

    id = IdField(primary_key=True)
    user_id = IdField()
    type = peewee.CharField(max_length=100)
    severity = peewee.CharField(max_length=10)
    title = peewee.CharField(max_length=200)
    titles: Any = JSONField(default=list)
    body = peewee.TextField()
    object_type = peewee.CharField(max_length=60, null=True)
    object_id = peewee.CharField(max_length=80, null=True)
    href = peewee.CharField(max_length=300, null=True)
    event_id = IdField(null=True)
    group_key = peewee.CharField(max_length=64)
    count = peewee.IntegerField(default=1)
    read_at = InstantField(null=True)
    created_at = InstantField()
    last_at = InstantField()

    class Meta:
        table_name = "notifications_notifications"
        indexes = (
            (("user_id", "created_at", "id"), False),
            (("user_id", "read_at", "created_at"), False),
            (("user_id", "group_key", "created_at"), False),
            (("created_at",), False),
        )


class Preference(Model):
    """A person's notification preferences: which events the person wants to be notified of, and when."""

    user_id = IdField(primary_key=True)
    mute: Any = JSONField(default=list)
    email = peewee.CharField(max_length=10, default="all")
    quiet_hours: Any = JSONField(null=True)

    class Meta:
        table_name = "notifications_preferences"


class Channel(Model):
    """A channel through which notifications are sent.

    `secrets` is an encrypted JSON object with the secret members of the config. `next_send_at` is the earliest time at
    which the next message may be sent, because the service asked to wait or limits the rate of messages.
    """

    visibility = ADMIN

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    created_at = InstantField()
    updated_at = InstantField()
    name = peewee.CharField(max_length=100, unique=True)
    type = peewee.CharField(max_length=60)
    config: Any = JSONField()
    secrets = SealedField(null=True)
    secret_names: Any = JSONField(default=list)
    is_enabled = peewee.BooleanField(default=True)
    last_success_at = InstantField(null=True)
    last_error = peewee.TextField(null=True)
    failing_since = InstantField(null=True)
    next_send_at = InstantField(null=True)

    class Meta:
        table_name = "notifications_channels"
        indexes = ((("created_at", "id"), False),)


class Rule(Model):
    """A rule, which determines which events are sent through which channels, and to whom.

    The rule applies only to events after `since_seq`.
    """

    visibility = ADMIN

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    created_at = InstantField()
    updated_at = InstantField()
    name = peewee.CharField(max_length=100, unique=True)
    events: Any = JSONField()
    conditions = peewee.TextField(null=True)
    min_severity = peewee.CharField(max_length=10)
    recipients: Any = JSONField()
    channel_ids: Any = JSONField()
    in_app = peewee.BooleanField()
    enabled = peewee.BooleanField()
    group_by: Any = JSONField()
    group_wait_seconds = peewee.IntegerField()
    group_interval_seconds = peewee.IntegerField()
    repeat_interval_seconds = peewee.IntegerField()
    quiet_hours: Any = JSONField(null=True)
    since_seq = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "notifications_rules"
        indexes = ((("created_at", "id"), False),)


class RuleChannel(Model):
    """A channel that a rule uses."""

    channel_id = IdField()
    rule_id = IdField()

    class Meta:
        table_name = "notifications_rule_channels"
        primary_key = peewee.CompositeKey("channel_id", "rule_id")
        indexes = ((("rule_id",), False),)


class RecipientProgress(Model):
    """The progress of notifying the recipients of an event, if one unit of work cannot notify all of them.

    Recipients are notified in the order of their ids. Everyone up to and including `user_id` has been notified.
    """

    event_id = IdField(primary_key=True)
    user_id = peewee.CharField(max_length=36)

    class Meta:
        table_name = "notifications_progress"


class Group(Model):
    """The events that match a rule and are sent through a channel as one message.

    `id` is a hash of the rule, the channel, the person and the values by which events are grouped. `objects` contains
    hashes of the objects and states reported by the last message, or is null if there were too many of them.
    """

    id = peewee.CharField(primary_key=True, max_length=64)
    last_sent_at = InstantField(index=True)
    objects: Any = JSONField(null=True)

    class Meta:
        table_name = "notifications_groups"


class Delivery(Model):
    """A message that was or will be sent through a channel.

    While `is_collecting` is true, further events of the group are added to the message. `due_at` is set while the
    delivery waits; it then equals `next_attempt_at`, which the API shows. While an attempt runs, `lease` is its fencing
    token, and the process must record the result of the attempt before `lease_until`. `ready_at` is the time from
    which the first attempt is allowed. `served` lists the addresses that already have the message.
    """

    visibility = ADMIN

    id = IdField(primary_key=True)
    channel_id = IdField()
    rule_id = IdField(null=True)
    group_id = peewee.CharField(max_length=64, null=True)
    group_key = peewee.CharField(max_length=200)
    user_id = IdField(null=True)
    severity = peewee.CharField(max_length=10)
    count = peewee.IntegerField(default=1)
    items: Any = JSONField()
    objects: Any = JSONField(null=True)
    status = peewee.CharField(max_length=10, default="pending")
    is_collecting = peewee.BooleanField(default=False)
    attempts = peewee.IntegerField(default=0)
    last_error = peewee.TextField(null=True)
    served: Any = JSONField(default=list)
    next_attempt_at = InstantField(null=True)
    due_at = InstantField(null=True)
    ready_at = InstantField(null=True)
    lease = IdField(null=True)
    lease_until = InstantField(null=True)
    created_at = InstantField()
    finished_at = InstantField(null=True, index=True)

    class Meta:
        table_name = "notifications_deliveries"
        indexes = (
            (("created_at", "id"), False),
            (("channel_id", "created_at", "id"), False),
            (("rule_id", "created_at", "id"), False),
        )


OPEN = ("pending", "retrying")
IS_OPEN = Delivery.status.in_(OPEN)
for _name, _fields, _where in (
    ("notifications_deliveries_due", (Delivery.channel_id, Delivery.due_at, Delivery.id), Delivery.due_at),
    ("notifications_deliveries_late", (Delivery.ready_at,), Delivery.due_at),
    ("notifications_deliveries_leased", (Delivery.lease_until,), Delivery.lease_until),
    ("notifications_deliveries_groups", (Delivery.group_id, Delivery.due_at), Delivery.due_at),
):
    Delivery.add_index(Delivery.index(*_fields, name=_name, where=_where.is_null(False)))

TABLES: tuple[type[Model], ...] = (
    Notification,
    Preference,
    Channel,
    Rule,
    RuleChannel,
    RecipientProgress,
    Group,
    Delivery,
)
