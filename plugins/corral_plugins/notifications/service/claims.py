"""Claims deliveries for attempts: one at a time per channel, and no faster than the channel's service allows.

A claim is a lease with a fencing token. Every method runs in the caller's unit of work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
import peewee

from corral import clock
from corral.database.dialect import advisory_lock
from corral.events import log as event_log
from corral.events.log import EventRow, LoggedEvent
from corral.ids import new_id
from corral_plugins.admin.api import KillSwitch
from corral_plugins.circuit_breakers.api import Breakers
from corral_plugins.notifications.api import ChannelType, Severity
from corral_plugins.notifications.models import IS_OPEN, Channel, Delivery, Group, Rule
from corral_plugins.notifications.service.channel_types import ChannelTypeRegistry
from corral_plugins.notifications.service.credentials import ChannelCredentials
from corral_plugins.notifications.service.delivery_changes import ended_columns, waiting_columns
from corral_plugins.notifications.service.grouping import (
    CRITICAL,
    LOCK,
    QUIET_KEY,
    Bundle,
    Target,
    join_or_begin,
    next_send_time,
    repeats_last_message,
)
from corral_plugins.notifications.service.quiet_hours import end_of_quiet_hours
from corral_plugins.notifications.service.recipients import People, Person

LEASE_SECONDS = 60  # the process renews it as long as the attempt runs
MAX_DUE, MAX_CHANNELS, AT_ONCE = 1000, 100, 500
GIVE_UP_SECONDS = 86_400
IS_DUE = Delivery.due_at.is_null(False)


class ClaimedDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery that this process may attempt until its lease ends.

    `to` is the recipient's email address, or None if the delivery is not addressed to a person.
    """

    channel: Channel
    kind: ChannelType
    delivery: Delivery
    to: str | None


class ClaimResult(msgspec.Struct, frozen=True, kw_only=True):
    """The claimed deliveries. `more` is true if more deliveries might be due."""

    claimed: list[ClaimedDelivery]
    more: bool


class DeliveryClaims:
    """Claims and releases deliveries."""

    switch: KillSwitch | None
    breakers: Breakers | None

    def __init__(self, types: ChannelTypeRegistry, people: People, credentials: ChannelCredentials) -> None:
        self._types, self._people, self._credentials = types, people, credentials

    def next_due_time(self) -> str | None:
        """Return the time at which the next delivery through an enabled channel is due, or None if there is none."""
        first = Delivery.select(Delivery.due_at).where((Delivery.channel_id == Channel.id) & IS_DUE)
        earliest = first.order_by(Delivery.due_at).limit(1)
        times: Any = Channel.select(earliest.alias("due_at")).where(Channel.is_enabled)
        return min((str(due) for (due,) in times.tuples() if due is not None), default=None)

    def claim(self) -> ClaimResult:
        """For each channel that can send now, claim the delivery that has been due longest."""
        if self.is_stopped_by_kill_switch():
            return ClaimResult(claimed=[], more=False)
        advisory_lock(LOCK)  # so that a channel sends one message at a time, with all events that joined it
        ready = [row for row in _due_channels() if self._is_ready(row)]
        usable = {row.id: row for row in ready[:MAX_CHANNELS]}
        rows = _first_due(usable)
        if not rows:
            return ClaimResult(claimed=[], more=False)
        rules = {row.id: row for row in Rule.select().where(Rule.id.in_({row.rule_id for row in rows}))}
        groups = {row.id: row for row in Group.select().where(Group.id.in_({row.group_id for row in rows}))}
        earlier = _earlier_retry_times(rows)
        people = self._people.load({row.user_id for row in rows if row.user_id is not None})
        logged = _reported_events(row for row in rows if row.user_id in people)
        claimed = []
        for row in rows:
            rule, group_id = rules.get(row.rule_id or ""), row.group_id or ""
            if row.user_id in people and not self._is_still_wanted(row, people[row.user_id], logged):
                continue
            if not _passes_quiet_hours(row, rule, people):
                continue
            if (
                rule
                and row.is_collecting
                and not _may_send_collected(row, rule, groups.get(group_id), earlier.get(group_id))
            ):
                continue
            if (lease := self._lease(row, usable[row.channel_id], people)) is not None:
                claimed.append(lease)
        return ClaimResult(claimed=claimed, more=True)

    def renew(self, claimed: ClaimedDelivery) -> None:
        """Extend the lease of a running attempt, and store the addresses that already have the message."""
        changes = {"lease_until": clock.now(LEASE_SECONDS), "served": [*claimed.delivery.served]}
        Delivery.update(changes).where(has_valid_claim(claimed.delivery)).execute()

    def release(self, claimed: ClaimedDelivery, due_at: str) -> None:
        """Release a delivery that was not attempted.

        The delivery becomes due at `due_at` and can collect events again.
        """
        changes = {**waiting_columns(due_at), "is_collecting": claimed.delivery.is_collecting}
        changes |= {"served": claimed.delivery.served}
        Delivery.update(changes).where(has_valid_claim(claimed.delivery)).execute()

    def needs_maintenance(self) -> bool:
        """Return whether any delivery has an expired lease, has been due for a day, or belongs to a deleted channel."""
        expired = Delivery.select().where(Delivery.lease_until <= clock.now()).limit(1)
        late = Delivery.select().where(IS_DUE & (Delivery.ready_at < clock.now(-GIVE_UP_SECONDS))).limit(1)
        return expired.exists() or late.exists() or Delivery.select().where(_is_orphaned()).limit(1).exists()

    def release_expired(self) -> int:
        """Release deliveries claimed by processes that ended without recording a result. Return their number."""
        now = clock.now()
        return int(Delivery.update(waiting_columns(now)).where(Delivery.lease_until <= now).execute())

    def cancel_orphans(self) -> int:
        """Cancel due deliveries whose channels were deleted. Return the number of cancelled deliveries."""
        some = Delivery.select(Delivery.id).where(_is_orphaned()).limit(AT_ONCE)
        return int(Delivery.update(ended_columns("cancelled")).where(Delivery.id.in_(some) & IS_DUE).execute())

    def fail_overdue(self) -> int:
        """Mark deliveries as failed if their channel has been unusable for a day. Return how many were marked.

        Another process might have the channel type or the master key that this process lacks, and might send the
        deliveries. A delivery is therefore marked as failed only after it has been due for a day.
        """
        if self.is_stopped_by_kill_switch():
            return 0
        day_ago = clock.now(-GIVE_UP_SECONDS)
        is_late = IS_DUE & (Delivery.ready_at < day_ago)
        ids = [row.channel_id for row in Delivery.select(Delivery.channel_id).where(is_late).distinct().limit(500)]
        rows = list(Channel.select().where(Channel.id.in_(ids)))
        unusable = [row.id for row in rows if not row.is_enabled or self._is_blocked(row)]
        unknown = [row.id for row in rows if not self._is_ready(row)]
        if not unknown:
            return 0
        is_blocked = Delivery.channel_id.in_(unusable) | (
            Delivery.channel_id.in_(unknown) & (Delivery.due_at < day_ago)
        )
        failed = {**ended_columns("failed"), "last_error": "The channel could not be used for 24 hours."}
        some = Delivery.select(Delivery.id).where(is_late & is_blocked).limit(AT_ONCE)
        return int(Delivery.update(failed).where(Delivery.id.in_(some) & IS_DUE).execute())

    def is_stopped_by_kill_switch(self) -> bool:
        """Return whether the kill switch is engaged and stops deliveries."""
        return self.switch is not None and (state := self.switch.state()).engaged and state.hold_deliveries

    # -- parts

    def _is_ready(self, row: Channel) -> bool:
        """Return whether a channel can send now.

        A channel can send if it is enabled, its channel type is active, its master key is loaded, and its
        circuit breaker is not open.
        """
        if not row.is_enabled or self._types.find(row.type) is None or not self._credentials.has_key(row):
            return False
        return not self._is_blocked(row)

    def _is_blocked(self, row: Channel) -> bool:
        """Return whether the circuit breaker of a channel is open."""
        return self.breakers is not None and self.breakers.blocked_until(self._types.breaker_of(row)) is not None

    def _is_still_wanted(self, row: Delivery, person: Person, logged: Mapping[str, LoggedEvent]) -> bool:
        """Return whether a message may still be sent to a person. If not, cancel the message.

        The person may have lost permissions or muted the events since the events were collected.
        """
        events = [logged[item["event_id"]] for item in row.items if item["event_id"] in logged]
        if self._people.still_wants(person, {item["event"] for item in row.items}, events):
            return True
        _end_delivery(
            row, "cancelled", "The person no longer wants the notification, or may no longer read its events."
        )
        return False

    def _lease(self, row: Delivery, channel: Channel, people: Mapping[str, Person]) -> ClaimedDelivery | None:
        """Claim a delivery. Return None if the delivery ended in the meantime."""
        kind, lease = self._types.require(channel.type), new_id()
        leased = {"is_collecting": False, "due_at": None, "lease": lease, "lease_until": clock.now(LEASE_SECONDS)}
        if not Delivery.update(leased).where((Delivery.id == row.id) & IS_DUE).execute():
            return None
        if kind.pace_seconds:
            Channel.update(next_send_at=clock.now(kind.pace_seconds)).where(Channel.id == channel.id).execute()
        row.lease = lease
        return ClaimedDelivery(
            channel=channel, kind=kind, delivery=row, to=people[row.user_id].email if row.user_id is not None else None
        )


def has_valid_claim(delivery: Delivery) -> Any:
    """Return the SQL condition for a delivery whose claim is still valid."""
    return (Delivery.id == delivery.id) & (Delivery.lease == delivery.lease)


def _due_channels() -> list[Channel]:
    """Return the enabled channels that have due deliveries, can send now, and are not already sending a delivery."""
    now = clock.now()
    due = Delivery.select(peewee.SQL("1")).where((Delivery.channel_id == Channel.id) & (Delivery.due_at <= now))
    running = Delivery.select(Delivery.channel_id).where(Delivery.lease_until.is_null(False))
    free = Channel.is_enabled & (Channel.next_send_at.is_null() | (Channel.next_send_at <= now))
    where = free & peewee.fn.EXISTS(due) & Channel.id.not_in(running)
    return list(Channel.select().where(where).order_by(Channel.id).limit(MAX_DUE))


def _is_orphaned() -> Any:
    """Return the SQL condition for a due delivery whose channel was deleted."""
    return (Delivery.due_at <= clock.now()) & Delivery.channel_id.not_in(Channel.select(Channel.id))


def _first_due(channel_ids: Iterable[str]) -> Sequence[Delivery]:
    """Return, for each channel, the delivery that has been due longest, without reading other deliveries."""
    is_due = (Delivery.channel_id == Channel.id) & (Delivery.due_at <= clock.now())
    first = Delivery.select(Delivery.id).where(is_due).order_by(Delivery.due_at, Delivery.id).limit(1)
    found: Any = Channel.select(first.alias("first_due")).where(Channel.id.in_(list(channel_ids))).tuples()
    ids = [delivery_id for (delivery_id,) in found if delivery_id is not None]
    return list(Delivery.select().where(Delivery.id.in_(ids)).order_by(Delivery.id)) if ids else []


def _reported_events(rows: Iterable[Delivery]) -> dict[str, LoggedEvent]:
    """Return the events reported by the deliveries, keyed by id. Events that are no longer in the log are omitted."""
    ids = {item["event_id"] for row in rows for item in row.items if item["event_id"] is not None}
    return {event.id: event for event in event_log.select([EventRow.id.in_(ids)], len(ids))} if ids else {}


def _earlier_retry_times(rows: Sequence[Delivery]) -> dict[str, str]:
    """Return, keyed by group id, the time at which an earlier message of each delivery's group will be retried.

    Groups without a message that will be retried are omitted.
    """
    waits = Delivery.group_id.in_({row.group_id for row in rows}) & IS_DUE & ~Delivery.is_collecting
    found = Delivery.select(Delivery.group_id, Delivery.due_at).where(waits & (Delivery.status == "retrying"))
    return {str(row.group_id): str(row.due_at) for row in found}


def _passes_quiet_hours(row: Delivery, rule: Rule | None, people: Mapping[str, Person]) -> bool:
    """Return whether a due delivery may be sent now. If not, end it or hold it until quiet hours end.

    The quiet hours of the rule and those of the person both apply.
    """
    if row.user_id is not None and row.user_id not in people:
        _end_delivery(row, "cancelled", "The person is not active.")
        return False
    if rule is None or row.severity == CRITICAL or not (row.is_collecting or row.status == "retrying"):
        return True  # what an admin repeats is sent at once
    person = people.get(row.user_id) if row.user_id is not None else None
    hours = [rule.quiet_hours, person.quiet_hours if person is not None else None]
    ends = [end for each in hours if (end := end_of_quiet_hours(each, clock.time_s())) is not None]
    if ends:
        _hold(row, max(ends))
    return not ends


def _may_send_collected(row: Delivery, rule: Rule, group: Group | None, earlier: str | None) -> bool:
    """Return whether a message that still collects events may be sent now.

    If not, suppress the message or let it collect further events. The message waits while an earlier message of its
    group is still being retried, and then until the rule's `group_interval_seconds` have passed since the group's last
    message.
    """
    if row.group_key == QUIET_KEY:
        return True
    if earlier is not None:
        Delivery.update(waiting_columns(max(earlier, clock.now()))).where((Delivery.id == row.id) & IS_DUE).execute()
        return False
    if repeats_last_message(row, group, rule.repeat_interval_seconds):
        _end_delivery(row, "suppressed", "The same notification was already sent within repeat_interval_seconds.")
        return False
    if group is not None and (since := next_send_time(group, rule)) > clock.now():
        Delivery.update({**waiting_columns(since), "ready_at": since}).where((Delivery.id == row.id) & IS_DUE).execute()
        return False
    return True


def _end_delivery(row: Delivery, status: str, reason: str) -> None:
    Delivery.update({**ended_columns(status), "last_error": reason}).where((Delivery.id == row.id) & IS_OPEN).execute()


def _hold(row: Delivery, until: str) -> None:
    """Move the events of a delivery to the summary that is sent at `until`, when quiet hours end.

    The summary itself, and messages that were already attempted, wait unchanged.
    """
    if row.group_key == QUIET_KEY or not row.is_collecting:
        Delivery.update({**waiting_columns(until), "ready_at": until}).where((Delivery.id == row.id) & IS_DUE).execute()
        return
    target = Target(rule_id=row.rule_id, channel_id=row.channel_id, user_id=row.user_id, group_key=QUIET_KEY)
    bundle = Bundle()
    bundle.merge(cast(Severity, row.severity), row.count, row.items, row.objects)
    join_or_begin(target, bundle, until)
    _end_delivery(
        row, "suppressed", "Held back during quiet hours; the summary after the quiet hours contains its events."
    )
