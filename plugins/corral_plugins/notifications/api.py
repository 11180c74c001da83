"""The public interface of the `notifications` plugin: the events, and the channel types that plugins contribute."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from corral.database.model import ADMIN, PRIVATE
from corral.events.event import Event

Json = dict[str, Any]
Severity = Literal["info", "warning", "error", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error", "critical")


class OutgoingItem(msgspec.Struct, frozen=True, kw_only=True):
    """One of the events reported by an outgoing notification.

    `href` is the address of the object that the event is about, or null.
    """

    event_id: str | None
    event: str
    title: str
    body: str
    href: str | None
    at: str


class OutgoingNotification(msgspec.Struct, frozen=True, kw_only=True):
    """A notification that is being sent through a channel.

    `items` contains at most 10 of the `count` events. The texts are plain text with values from people and agents, so a
    channel type must escape them for its service. `url` leads to the object that the notification is about, and
    `preferences_url` to the preferences. `to` is the recipient's address if the channel notifies each recipient
    separately. `served` lists the addresses that an earlier attempt has reached. A channel type with several addresses
    adds each address that it reaches.
    """

    id: str
    event: str
    severity: Severity
    title: str
    body: str
    count: int
    items: Sequence[OutgoingItem]
    url: str | None
    preferences_url: str | None
    created_at: str
    to: str | None = None
    served: list[str] = []


class SendResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an attempt to send a notification. `error` is null if the service accepted the notification.

    A `permanent` failure is not retried. `retry_after` is the number of seconds that the service asked to wait. A
    failure with `says_nothing` does not show whether the service works, so the circuit breaker ignores it. If the
    channel has several addresses, `served` lists the addresses that now have the notification.
    """

    error: str | None = None
    permanent: bool = False
    retry_after: float | None = None
    says_nothing: bool = False
    served: Sequence[str] = ()


class ChannelType(msgspec.Struct, frozen=True, kw_only=True):
    """A type of channel. Plugins contribute types with the hook `corral_notification_channels`.

    `schema` describes `config`. `secrets` names the members of `config` that are encrypted in the database.
    `pace_seconds` is the shortest time between two messages sent through a channel. `breaker` is the name of the
    circuit breaker that all channels of the type share; without a name, each channel has its own circuit breaker.

    `send(config, notification)` sends a notification and returns the result. It runs outside units of work.
    `check(config)` runs when a channel is saved. It returns warnings, or raises `Invalid` with pointers that begin with
    `/config`.
    """

    type: str
    title: str
    schema: Json
    secrets: tuple[str, ...]
    send: Callable[[Mapping[str, Any], OutgoingNotification], Awaitable[SendResult]]
    check: Callable[[Mapping[str, Any]], Awaitable[Sequence[str]]] | None = None
    pace_seconds: float = 0.0
    breaker: str | None = None


class NotificationView(msgspec.Struct, kw_only=True):
    """A notification addressed to the caller.

    `count` is the number of events that the notification reports. `title` is the title of the latest event, and
    `titles` are the first 10 distinct titles of its events. `event_id` is the id of the latest event, or null if a
    workflow or a trigger sent the notification.
    """

    id: str
    user_id: str
    type: str
    severity: Severity
    title: str
    titles: list[str]
    body: str
    object: dict[str, str] | None
    href: str | None
    event_id: str | None
    group_key: str
    count: int
    read_at: str | None
    created_at: str


class NotificationArrived(Event, kw_only=True):
    """A notification arrived, or another event was added to an unread notification.

    `unread` is the number of unread notifications.
    """

    event = "notification"
    visibility = PRIVATE

    notification: NotificationView
    unread: int


class NotificationChannelChanged(Event, kw_only=True):
    """A notification channel was created, changed or deleted. `change` is `created`, `updated` or `deleted`."""

    event = "notification_channel.changed"
    visibility = ADMIN
    area = "notifications"

    channel_id: str
    name: str
    change: str


EVENTS: tuple[type[Event], ...] = (NotificationArrived, NotificationChannelChanged)
