"""Reads rows of notifications, channels, rules and deliveries, and builds their API representations."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import msgspec

from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.errors import NotFound
from corral.schema.conversion import convert
from corral_plugins.notifications.api import NotificationView, Severity
from corral_plugins.notifications.models import Channel, Delivery, Notification, Rule, RuleChannel
from corral_plugins.notifications.shapes import (
    ChannelStatus,
    DeliveredEvent,
    DeliveryStatus,
    NotificationChannelView,
    NotificationDeliveryView,
    NotificationRuleView,
    QuietHours,
    RuleRecipients,
    RuleRef,
)

MASK = "********"
MAX_USED_BY = 100


def find_notification(notification_id: str, caller: Principal) -> Notification:
    """Return one of the caller's notifications. Raise `NotFound` if there is none with this id."""
    mine = (Notification.id == notification_id.lower()) & visible(Notification, caller)
    row: Notification | None = Notification.get_or_none(mine)
    if row is None:
        raise NotFound("You have no notification with this id.")
    return row


def find_channel(channel_id: str) -> Channel:
    """Return a channel. Raise `NotFound` if it does not exist."""
    row: Channel | None = Channel.get_or_none(Channel.id == channel_id.lower())
    if row is None:
        raise NotFound("There is no channel with this id.")
    return row


def find_rule(rule_id: str) -> Rule:
    """Return a rule. Raise `NotFound` if it does not exist."""
    row: Rule | None = Rule.get_or_none(Rule.id == rule_id.lower())
    if row is None:
        raise NotFound("There is no notification rule with this id.")
    return row


def find_delivery(delivery_id: str) -> Delivery:
    """Return a delivery. Raise `NotFound` if it does not exist."""
    row: Delivery | None = Delivery.get_or_none(Delivery.id == delivery_id.lower())
    if row is None:
        raise NotFound("There is no delivery with this id.")
    return row


def notification_view(row: Notification) -> NotificationView:
    """Return the API representation of a notification."""
    about = {"type": row.object_type, "id": row.object_id or ""} if row.object_type is not None else None
    names = {*NotificationView.__struct_fields__} - {"object", "severity"}
    fields = {name: getattr(row, name) for name in names} | {"titles": row.titles or [row.title]}
    return NotificationView(**fields, object=about, severity=cast(Severity, row.severity))


def used_by(channel_ids: Collection[str]) -> dict[str, list[RuleRef]]:
    """Return, for each channel, at most 100 rules that use the channel."""
    joined = Rule.select(RuleChannel.channel_id, Rule.id, Rule.name).join(
        RuleChannel, on=RuleChannel.rule_id == Rule.id
    )
    rows: Any = joined.where(RuleChannel.channel_id.in_(list(channel_ids))).order_by(Rule.name).tuples()
    found: dict[str, list[RuleRef]] = {}
    for channel_id, rule_id, name in rows:
        rules = found.setdefault(channel_id, [])
        if len(rules) < MAX_USED_BY:
            rules.append(RuleRef(id=rule_id, name=name))
    return found


def status_of(row: Channel) -> ChannelStatus:
    """Return the status of a channel, based on its last attempt."""
    if row.failing_since is not None:
        return "failing"
    return "untested" if row.last_success_at is None else "ok"


def channel_view(row: Channel, rules: list[RuleRef]) -> NotificationChannelView:
    """Return the API representation of a channel, with its secrets masked."""
    names = {*NotificationChannelView.__struct_fields__} - {"config", "status", "used_by", "warnings"}
    fields = {name: getattr(row, name) for name in names}
    config = {**row.config, **dict.fromkeys(row.secret_names, MASK)}
    return NotificationChannelView(**fields, config=config, status=status_of(row), used_by=rules)


def rule_view(row: Rule) -> NotificationRuleView:
    """Return the API representation of a rule."""
    names = {*NotificationRuleView.__struct_fields__} - {"recipients", "quiet_hours", "min_severity"}
    return NotificationRuleView(
        **{name: getattr(row, name) for name in names},
        min_severity=cast(Severity, row.min_severity),
        recipients=convert(RuleRecipients, row.recipients),
        quiet_hours=None if row.quiet_hours is None else convert(QuietHours, row.quiet_hours),
    )


def delivery_view(row: Delivery) -> NotificationDeliveryView:
    """Return the API representation of a delivery."""
    names = {*NotificationDeliveryView.__struct_fields__} - {"events", "status", "severity"}
    return NotificationDeliveryView(
        **{name: getattr(row, name) for name in names},
        events=[msgspec.convert(each, DeliveredEvent) for each in row.items],
        status=cast(DeliveryStatus, row.status),
        severity=cast(Severity, row.severity),
    )
