"""Groups events into outgoing messages: a burst of events becomes one message.

Functions that access the database run in the caller's unit of work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import msgspec

from corral import clock
from corral.database.dialect import advisory_lock
from corral.ids import new_id
from corral_plugins.notifications.api import SEVERITIES, Json, Severity
from corral_plugins.notifications.models import Delivery, Group, Rule

SHOWN_ITEMS, MAX_OBJECTS, AT_ONCE = 10, 200, 500
QUIET_KEY = "quiet hours"
CRITICAL = "critical"
LOCK = "notifications.collect"
"""The lock held while events are added to waiting messages, or while messages are claimed, so that no event is lost."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The destination of a message: a channel, a group of events and, if the channel notifies individuals, a person."""

    rule_id: str
    channel_id: str
    user_id: str | None
    group_key: str
    hold_until: str | None = None

    @property
    def id(self) -> str:
        """The hash that identifies the target's group of events."""
        parts = [self.rule_id, self.channel_id, self.user_id, self.group_key]
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class Bundle(msgspec.Struct, kw_only=True):
    """The events in one batch that have the same target."""

    severity: Severity = "info"
    count: int = 0
    items: list[Json] = []
    objects: list[str] | None = []

    def add(self, item: Json, severity: Severity, object: tuple[str, str], state: Iterable[Any]) -> None:
        """Add an event. `state` is the reported state of the event's object."""
        state_hash = state_hash_of(item["event"], object, severity, item["title"], *state)
        objects = merge_state_hashes(self.objects, [state_hash])
        self.merge(severity, 1, [item], objects)

    def merge(self, severity: Severity, count: int, items: list[Json], objects: list[str] | None) -> None:
        """Add several events.

        `objects` contains the state hashes of all events in the bundle, or is None if there are too many.
        """
        self.severity, self.count = higher_severity(self.severity, severity), self.count + count
        self.items = [*self.items, *items][:SHOWN_ITEMS]
        self.objects = objects


def state_hash_of(event: str, object: tuple[str, str], *state: Any) -> str:
    """Return a short hash of an event's object and reported state.

    It is used to detect that nothing new has been reported.
    """
    return hashlib.sha256(msgspec.json.encode([event, *object, *state])).hexdigest()[:16]


def merge_state_hashes(known: list[str] | None, more: list[str] | None) -> list[str] | None:
    """Merge two lists of state hashes without duplicates. Return None if there are too many hashes to store."""
    if known is None or more is None:
        return None
    merged = list(dict.fromkeys([*known, *more]))
    return merged if len(merged) <= MAX_OBJECTS else None


def higher_severity(one: Severity, other: Severity) -> Severity:
    """Return the higher of two severities."""
    return max(one, other, key=SEVERITIES.index)


def group_key_of(group_by: Iterable[str], event: str, object: tuple[str, str], data: Mapping[str, Any]) -> str:
    """Return the text that identifies the group of an event: its values for the `group_by` keys, or else its object."""
    keys = list(group_by)
    if not keys:
        return f"{event} {object[0]} {object[1]}"[:200]
    pairs = [f"{key}={_key_text(data.get(key))}" for key in keys]
    text = ", ".join(pairs)
    return text if len(text) <= 200 else f"{text[:135]} {hashlib.sha256(text.encode()).hexdigest()}"[:200]


def write_bundles(bundles: Mapping[Target, Bundle], rules: Mapping[str, Rule]) -> None:
    """Add events to messages that are still collecting events, or create new messages."""
    if not bundles:
        return
    advisory_lock(LOCK)
    groups = {target.id: target for target in bundles}
    collecting = _collecting(groups)
    last = {row.id: row for row in Group.select().where(Group.id.in_(list(groups)))}
    begun: list[Delivery] = []
    for target, bundle in bundles.items():
        row = collecting.get(target.id)
        if row is None or not _add_to_message(row, bundle):
            group = last.get(target.id)
            begun.append(_new_row(target, bundle, _due_at(target, rules[target.rule_id], group)))
    Delivery.bulk_create(begun, batch_size=AT_ONCE)


def join_or_begin(target: Target, bundle: Bundle, due_at: str) -> None:
    """Add events to the message that still collects the target's events, or create a message that is due at `due_at`.

    The caller must hold the lock `LOCK`.
    """
    row = _collecting([target.id]).get(target.id)
    if row is None or not _add_to_message(row, bundle):
        _new_row(target, bundle, due_at).save(force_insert=True)


def remember_sent(row: Delivery) -> None:
    """Store the objects that a group's last message reported, and the time when the message was sent."""
    if row.group_id is not None:
        now = clock.now()
        sent = {Group.last_sent_at: now, Group.objects: row.objects}
        insert = Group.insert(id=row.group_id, last_sent_at=now, objects=row.objects)
        insert.on_conflict(conflict_target=[Group.id], update=sent).execute()


def next_send_time(group: Group, rule: Rule) -> str:
    """Return the earliest instant at which the next message of a group may be sent."""
    return clock.format_instant(clock.parse_instant(group.last_sent_at) + rule.group_interval_seconds)


def repeats_last_message(row: Delivery, group: Group | None, repeat_seconds: int) -> bool:
    """Return whether a message only repeats the group's last message, which was sent too recently to be repeated."""
    if group is None or row.objects is None or group.objects is None or not set(row.objects) <= set(group.objects):
        return False
    return repeat_seconds == 0 or group.last_sent_at > clock.now(-repeat_seconds)


def _key_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _collecting(group_ids: Collection[str]) -> dict[str, Delivery]:
    is_open = Delivery.due_at.is_null(False) & Delivery.is_collecting
    rows = Delivery.select().where(Delivery.group_id.in_(list(group_ids)) & is_open)
    return {str(row.group_id): row for row in rows}


def _due_at(target: Target, rule: Rule, group: Group | None) -> str:
    if target.hold_until is not None:
        return target.hold_until
    due = clock.now(rule.group_wait_seconds)
    return due if group is None else max(due, next_send_time(group, rule))


def _add_to_message(row: Delivery, bundle: Bundle) -> bool:
    """Add events to a message. Return False if the message no longer collects events."""
    changes = {
        "severity": higher_severity(cast(Severity, row.severity), bundle.severity),
        "count": row.count + bundle.count,
        "items": [*row.items, *bundle.items][:SHOWN_ITEMS],
        "objects": merge_state_hashes(row.objects, bundle.objects),
    }
    collects = (Delivery.id == row.id) & Delivery.is_collecting & Delivery.due_at.is_null(False)
    return bool(Delivery.update(changes).where(collects).execute())


def _new_row(target: Target, bundle: Bundle, due_at: str) -> Delivery:
    return Delivery(
        id=new_id(),
        channel_id=target.channel_id,
        rule_id=target.rule_id,
        group_id=target.id,
        group_key=target.group_key,
        user_id=target.user_id,
        severity=bundle.severity,
        count=bundle.count,
        items=bundle.items,
        objects=bundle.objects,
        is_collecting=True,
        next_attempt_at=due_at,
        due_at=due_at,
        ready_at=due_at,
        created_at=clock.now(),
    )
