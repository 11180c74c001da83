"""Claims deliveries for attempts: one at a time for each channel, as fast as its service allows.

A claim is a lease with a fencing token. Every method runs in the caller's unit of work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
import peewee

from corral import clock
from corral.database.dialect import advisory_lock
from corral.ids import new_id
from corral_plugins.admin.api import KillSwitch
from corral_plugins.circuit_breakers.api import Breakers
from corral_plugins.notifications.api import ChannelType, Severity
from corral_plugins.notifications.models import IS_OPEN, Channel, Delivery, Group, Rule
from corral_plugins.notifications.service.channel_types import ChannelTypeRegistry
from corral_plugins.notifications.service.grouping import (
    CRITICAL,
    QUIET_KEY,
    Bundle,
    Target,
    is_unchanged,
    join_or_begin,
    remember_sent,
)
from corral_plugins.notifications.service.people import People, Person
from corral_plugins.notifications.service.quiet_hours import end_of_quiet_hours
from corral_plugins.notifications.service.states import ended, waiting_until

LEASE_SECONDS = 60  # a mail to 50 addresses takes a while; a lease that ends early only causes a second attempt
MAIL_LEASE_SECONDS = 900
MAX_CHANNELS, AT_ONCE = 100, 500
GIVE_UP_SECONDS = 86_400
IS_DUE = Delivery.due_at.is_null(False)


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery that this process may attempt until its lease ends. `to` is the address of its person."""

    channel: Channel
    kind: ChannelType
    delivery: Delivery
    to: str | None


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """The claimed deliveries, and whether there may be more."""

    claimed: list[Claimed]
    more: bool


class DeliveryClaims:
    """Claims and releases deliveries."""

    switch: KillSwitch | None
    breakers: Breakers | None

    def __init__(self, types: ChannelTypeRegistry, people: People) -> None:
        self._types, self._people = types, people

    def next_time(self) -> str | None:
        """Return the instant at which the next delivery is due, or None if none waits."""
        due: Any = Delivery.select(peewee.fn.MIN(Delivery.due_at)).where(IS_DUE).scalar()
        return None if due is None else str(due)

    def claim(self) -> Claims:
        """Claim the first due delivery of each channel that can be used now."""
        if self.holds_deliveries():
            return Claims(claimed=[], more=False)
        advisory_lock("notifications.claim")  # so that a channel sends one message at a time
        channels = {row.id: row for row in self._due_channels()}
        usable = {key: row for key, row in channels.items() if self._is_usable(row)}
        rows = _first_due(usable)
        self._cancel_orphans()
        if not rows:
            return Claims(claimed=[], more=False)
        rules = {row.id: row for row in Rule.select().where(Rule.id.in_({row.rule_id for row in rows}))}
        groups = {row.id: row for row in Group.select().where(Group.id.in_({row.group_id for row in rows}))}
        people = self._people.load({row.user_id for row in rows if row.user_id is not None})
        claimed = []
        for row in rows:
            if self._is_to_be_sent(row, rules.get(row.rule_id or ""), groups.get(row.group_id or ""), people):
                claimed.append(self._lease(row, usable[row.channel_id], people))
        return Claims(claimed=claimed, more=True)

    def release(self, claimed: Claimed, due_at: str) -> None:
        """Give back a delivery that was not attempted. It is due at an instant."""
        Delivery.update(waiting_until(due_at)).where(holds(claimed.delivery)).execute()

    def has_late(self) -> bool:
        """Return whether a lease has ended, or a delivery has been due for a day."""
        expired = Delivery.select().where(Delivery.lease_until <= clock.now()).limit(1)
        late = Delivery.select().where(IS_DUE & (Delivery.ready_at < clock.now(-GIVE_UP_SECONDS))).limit(1)
        return expired.exists() or late.exists()

    def release_expired(self) -> int:
        """Give back the deliveries of processes that ended without recording a result. Return their number."""
        now = clock.now()
        return int(Delivery.update(waiting_until(now)).where(Delivery.lease_until <= now).execute())

    def give_up(self) -> int:
        """Let deliveries fail whose channel could not be used for a day. Return their number."""
        if self.holds_deliveries():
            return 0
        is_late = IS_DUE & (Delivery.ready_at < clock.now(-GIVE_UP_SECONDS))
        ids = [row.channel_id for row in Delivery.select(Delivery.channel_id).where(is_late).distinct().limit(500)]
        blocked = [row.id for row in Channel.select().where(Channel.id.in_(ids)) if not self._is_ready(row)]
        if not blocked:
            return 0
        failed = {**ended("failed"), "last_error": "The channel could not be used for 24 hours."}
        some = Delivery.select(Delivery.id).where(is_late & Delivery.channel_id.in_(blocked)).limit(AT_ONCE)
        return int(Delivery.update(failed).where(Delivery.id.in_(some) & IS_DUE).execute())

    def holds_deliveries(self) -> bool:
        """Return whether the kill switch holds deliveries."""
        return self.switch is not None and (state := self.switch.state()).engaged and state.hold_deliveries

    # -- parts

    @staticmethod
    def _due_channels() -> list[Channel]:
        due = Delivery.select(peewee.SQL("1")).where(
            (Delivery.channel_id == Channel.id) & (Delivery.due_at <= clock.now())
        )
        running = Delivery.select(Delivery.channel_id).where(Delivery.lease_until.is_null(False))
        free = peewee.fn.EXISTS(due) & Channel.id.not_in(running)
        return list(Channel.select().where(free).order_by(Channel.next_send_at, Channel.id).limit(MAX_CHANNELS))

    def _is_usable(self, row: Channel) -> bool:
        return self._is_ready(row) and (row.next_send_at is None or row.next_send_at <= clock.now())

    def _is_ready(self, row: Channel) -> bool:
        """Return whether a channel is enabled, its type active, and its circuit breaker not open."""
        if not row.is_enabled or self._types.find(row.type) is None:
            return False
        return self.breakers is None or self.breakers.blocked_until(self._types.breaker_of(row)) is None

    @staticmethod
    def _cancel_orphans() -> None:
        """Cancel deliveries to channels that were deleted."""
        orphaned = (Delivery.due_at <= clock.now()) & Delivery.channel_id.not_in(Channel.select(Channel.id))
        some = Delivery.select(Delivery.id).where(orphaned).limit(AT_ONCE)
        Delivery.update(ended("cancelled")).where(Delivery.id.in_(some) & IS_DUE).execute()

    def _is_to_be_sent(
        self, row: Delivery, rule: Rule | None, group: Group | None, people: Mapping[str, Person]
    ) -> bool:
        """Return whether a due delivery is to be sent. Otherwise, it ends or is held."""
        if row.user_id is not None and row.user_id not in people:
            _end(row, "cancelled", "The person is not active.")
            return False
        if rule is None or row.attempts or not row.is_collecting:
            return True
        person = people.get(row.user_id) if row.user_id is not None else None
        hours = [rule.quiet_hours, person.quiet_hours if person is not None else None]
        ends = [end for each in hours if (end := end_of_quiet_hours(each, clock.time_s())) is not None]
        if ends and row.severity != CRITICAL:
            _hold(row, max(ends))
            return False
        if row.group_key != QUIET_KEY and is_unchanged(row, group, rule.repeat_interval_seconds):
            _end(row, "suppressed", "The same was sent before (repeat_interval_seconds).")
            return False
        return True

    def _lease(self, row: Delivery, channel: Channel, people: Mapping[str, Person]) -> Claimed:
        kind, lease = self._types.require(channel.type), new_id()
        seconds = MAIL_LEASE_SECONDS if len(channel.config.get("to", ())) > 1 else LEASE_SECONDS
        leased = {"due_at": None, "lease": lease, "lease_until": clock.now(seconds), "is_collecting": False}
        Delivery.update(leased).where((Delivery.id == row.id) & IS_DUE).execute()
        if row.is_collecting:
            remember_sent(row)
        if kind.pace_seconds:
            Channel.update(next_send_at=clock.now(kind.pace_seconds)).where(Channel.id == channel.id).execute()
        row.lease = lease
        return Claimed(
            channel=channel, kind=kind, delivery=row, to=people[row.user_id].email if row.user_id is not None else None
        )


def holds(delivery: Delivery) -> Any:
    """Return the condition that the claim of a delivery is still valid."""
    return (Delivery.id == delivery.id) & (Delivery.lease == delivery.lease)


def _first_due(channel_ids: Iterable[str]) -> Sequence[Delivery]:
    """Return the oldest due delivery of each channel."""
    ids = list(channel_ids)
    if not ids:
        return []
    is_due = Delivery.channel_id.in_(ids) & (Delivery.due_at <= clock.now())
    first = Delivery.select(peewee.fn.MIN(Delivery.id)).where(is_due).group_by(Delivery.channel_id)
    return list(Delivery.select().where(Delivery.id.in_(first)))


def _end(row: Delivery, status: str, reason: str) -> None:
    Delivery.update({**ended(status), "last_error": reason}).where((Delivery.id == row.id) & IS_OPEN).execute()


def _hold(row: Delivery, until: str) -> None:
    """Let the events of a delivery join the summary at the end of the quiet hours."""
    if row.group_key == QUIET_KEY:
        Delivery.update({**waiting_until(until), "ready_at": until}).where((Delivery.id == row.id) & IS_DUE).execute()
        return
    target = Target(rule_id=row.rule_id, channel_id=row.channel_id, user_id=row.user_id, group_key=QUIET_KEY)
    bundle = Bundle()
    bundle.merge(cast(Severity, row.severity), row.count, row.items, row.objects)
    join_or_begin(target, bundle, until)
    _end(row, "suppressed", "Held back by quiet hours; its events are in the summary at their end.")
