"""The request and response bodies of the notification routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, Name, line, text_format
from corral_plugins.notifications.api import Severity

ChannelStatus = Literal["ok", "failing", "untested"]
DeliveryStatus = Literal["pending", "retrying", "succeeded", "failed", "cancelled", "suppressed"]
EmailPreference = Literal["off", "important", "all"]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
ClockTime = Annotated[
    str,
    text_format(
        r"^([01][0-9]|2[0-3]):[0-5][0-9](?![\s\S])",
        "a time of day from 00:00 to 23:59, such as 22:00 or 06:30",
        examples=["22:00"],
    ),
]
Pattern = Annotated[str, line(100)]
Patterns = Annotated[list[Pattern], Meta(min_length=1, max_length=50, examples=[["task.failed"]])]
Condition = Annotated[str, Meta(min_length=1, max_length=1000, examples=["data.priority == 'high'"])]
ChannelIds = Annotated[list[Id], Meta(max_length=10)]
GroupBy = Annotated[list[Annotated[str, line(60)]], Meta(max_length=5, examples=[["agent_id"]])]
GroupWait = Annotated[int, Meta(ge=0, le=3600)]
GroupInterval = Annotated[int, Meta(ge=10, le=86_400)]
RepeatInterval = Annotated[int, Meta(ge=0, le=604_800)]
TypeName = Annotated[str, line(60), Meta(examples=["email"])]
Config = Annotated[dict[str, Any], Meta(examples=[{"to": ["someone@example.org"]}])]


class MarkRead(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Marks a notification as read or unread."""

    read: bool = True


class MarkAllRead(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The instant before which notifications are marked as read. The default is the time of the request."""

    before: MomentIn | UnsetType = UNSET


class MarkedRead(msgspec.Struct, kw_only=True):
    """The number of notifications that were marked as read."""

    updated: int


class UnreadCount(msgspec.Struct, kw_only=True):
    """The number of unread notifications, in total and by severity."""

    unread: int
    by_severity: dict[str, int]


class NotificationQuery(PageQuery, kw_only=True):
    """The filters for the list of notifications."""

    unread: bool | UnsetType = UNSET
    severity: list[Severity] | UnsetType = UNSET
    type: list[Pattern] | UnsetType = UNSET


class QuietHours(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """The hours during which only critical notifications are sent.

    Quiet hours belong to the day on which they begin.
    """

    from_: ClockTime
    to: ClockTime
    timezone: Annotated[str, line(64)] = "UTC"
    days: Annotated[list[Day], Meta(min_length=1, max_length=7)] = msgspec.field(
        default_factory=lambda: ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    )


class Preferences(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The caller's notification preferences.

    `mute` contains the names of muted events. If `email` is `important`, emails report only events with the severity
    `error` or `critical`.
    """

    mute: Annotated[list[Pattern], Meta(max_length=100)] = []
    email: EmailPreference = "all"
    quiet_hours: QuietHours | None = None


class PreferencesPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The preferences to change. Absent fields stay unchanged."""

    mute: Annotated[list[Pattern], Meta(max_length=100)] | UnsetType = UNSET
    email: EmailPreference | UnsetType = UNSET
    quiet_hours: QuietHours | UnsetType | None = UNSET


class NewChannel(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields for creating a channel. The schema of `config` depends on the type of the channel."""

    name: Name
    type: TypeName
    config: Config
    is_enabled: bool = True


class ChannelPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields to change in a channel. Absent fields stay unchanged.

    `config` is merged member by member: absent members stay unchanged, and null members are removed.
    """

    name: Name | UnsetType = UNSET
    type: TypeName | UnsetType = UNSET
    config: Config | UnsetType = UNSET
    is_enabled: bool | UnsetType = UNSET


class RuleRef(msgspec.Struct, kw_only=True):
    """A rule that uses a channel."""

    id: str
    name: str


class NotificationChannelView(msgspec.Struct, kw_only=True):
    """A channel. The secret members of its config are masked.

    `warnings` is present only in responses to requests that create or change the channel.
    """

    id: str
    version: int
    created_at: Instant
    updated_at: Instant
    name: str
    type: str
    config: dict[str, Any]
    is_enabled: bool
    status: ChannelStatus
    last_success_at: Instant | None
    last_error: str | None
    used_by: list[RuleRef]
    warnings: list[str] | UnsetType = UNSET


class ChannelTest(msgspec.Struct, kw_only=True):
    """The result of sending a test notification through a channel."""

    delivered: bool
    duration_ms: int
    error: str | None


class ChannelTypeView(msgspec.Struct, kw_only=True):
    """A type of channel, and the schema of its config."""

    type: str
    title: str
    schema: dict[str, Any]


class ChannelTypes(msgspec.Struct, kw_only=True):
    """The types of channels, sorted by name."""

    items: list[ChannelTypeView]


class RuleRecipients(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The recipients of a rule: people by id, all users with one of the roles, and the owner of the event's object."""

    users: Annotated[list[Id], Meta(max_length=50)] = []
    roles: Annotated[list[Literal["admin", "member", "viewer", "auditor"]], Meta(max_length=4)] = []
    owner: bool = False


class RuleFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The optional fields of a rule."""

    conditions: Condition | None = None
    min_severity: Severity = "info"
    recipients: RuleRecipients = msgspec.field(default_factory=lambda: RuleRecipients(owner=True))
    channel_ids: ChannelIds = []
    in_app: bool = True
    enabled: bool = True
    group_by: GroupBy = []
    group_wait_seconds: GroupWait = 30
    group_interval_seconds: GroupInterval = 300
    repeat_interval_seconds: RepeatInterval = 14_400
    quiet_hours: QuietHours | None = None


class NewNotificationRule(RuleFields, kw_only=True, forbid_unknown_fields=True):
    """The fields for creating a rule.

    `events` are names of events, prefixes such as `task.*`, or `*`. `conditions` is an expression over `event`, `data`
    and `severity`. Events that have the same values for the keys in `group_by` are sent as one message; without keys,
    events with the same name and object are grouped.
    """

    name: Name
    events: Patterns


class RulePatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields to change in a rule. Absent fields stay unchanged."""

    name: Name | UnsetType = UNSET
    events: Patterns | UnsetType = UNSET
    conditions: Condition | UnsetType | None = UNSET
    min_severity: Severity | UnsetType = UNSET
    recipients: RuleRecipients | UnsetType = UNSET
    channel_ids: ChannelIds | UnsetType = UNSET
    in_app: bool | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    group_by: GroupBy | UnsetType = UNSET
    group_wait_seconds: GroupWait | UnsetType = UNSET
    group_interval_seconds: GroupInterval | UnsetType = UNSET
    repeat_interval_seconds: RepeatInterval | UnsetType = UNSET
    quiet_hours: QuietHours | UnsetType | None = UNSET


class NotificationRuleView(msgspec.Struct, kw_only=True):
    """A rule, which determines which events are sent through which channels, and to whom."""

    id: str
    version: int
    created_at: Instant
    updated_at: Instant
    name: str
    events: list[str]
    conditions: str | None
    min_severity: Severity
    recipients: RuleRecipients
    channel_ids: list[str]
    in_app: bool
    enabled: bool
    group_by: list[str]
    group_wait_seconds: int
    group_interval_seconds: int
    repeat_interval_seconds: int
    quiet_hours: QuietHours | None


class TestRule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to test a rule by applying it to the events of the last `days` days."""

    days: Annotated[int, Meta(ge=1, le=30)] = 7


class PreviewedMessage(msgspec.Struct, kw_only=True):
    """A message that the rule would have sent. `titles` contains the titles of the message's first 10 events."""

    sent_at: Instant
    channel_id: str
    group_key: str
    count: int
    severity: Severity
    titles: list[str]


class RulePreview(msgspec.Struct, kw_only=True):
    """The messages that the rule would have sent.

    `events` is the number of events whose names match the rule, and `matched` is the number of events that also
    meet the conditions of the rule. `messages` is the number of messages, of which `items` contains the first 100.
    `truncated` is true if there were too many events to examine all of them.
    """

    events: int
    matched: int
    messages: int
    truncated: bool
    items: list[PreviewedMessage]


class NotificationDeliveryQuery(PageQuery, kw_only=True):
    """The filters for the list of deliveries."""

    channel_id: Id | UnsetType = UNSET
    rule_id: Id | UnsetType = UNSET
    status: list[DeliveryStatus] | UnsetType = UNSET


class DeliveredEvent(msgspec.Struct, kw_only=True):
    """An event reported by a delivery."""

    event_id: str | None
    event: str
    title: str


class NotificationDeliveryView(msgspec.Struct, kw_only=True):
    """A message that was or will be sent through a channel. `events` contains the first 10 of its `count` events."""

    id: str
    channel_id: str
    rule_id: str | None
    group_key: str
    user_id: str | None
    severity: Severity
    count: int
    events: list[DeliveredEvent]
    status: DeliveryStatus
    attempts: int
    last_error: str | None
    next_attempt_at: Instant | None
    created_at: Instant
    finished_at: Instant | None
