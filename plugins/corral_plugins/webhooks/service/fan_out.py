"""Reads the event log, and creates a delivery of each event to each subscribed webhook whose owner may read it.

The position in the log is the cursor of a durable consumer, so unread events are kept. The position is advanced in the
transaction that inserts the deliveries. If several processes read the same events, only one of them can advance the
position, and the others discard their work. An event subscriber would instead run for every event in the installation,
and would look up the webhooks once per event.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import EventRights
from corral.database.engine import Database
from corral.database.unit import SYSTEM, UnitContext
from corral.events import log as event_log
from corral.events.consumers import ConsumerRow
from corral.events.event import EventTypes
from corral.events.log import EventRow, LoggedEvent
from corral.ids import new_id
from corral_core.accounts.api import Accounts
from corral_core.event_log.api import LogCursor, PositionMoved, handle_next
from corral_plugins.webhooks.models import Delivery, Subscription, Webhook
from corral_plugins.webhooks.service.disabling import disable_webhooks
from corral_plugins.webhooks.service.payloads import body_of_event, matching_patterns

CONSUMER = "webhooks.fan_out"
CURSOR = LogCursor(CONSUMER)
ENTRY = UnitContext(label="webhooks.fan_out", actor=SYSTEM)
EVENTS_AT_ONCE, ROWS_AT_ONCE = 100, 500
WINDOW = 20_000  # positions of the log that one unit searches
RECORDED_REASONS = ("failing", "gone")
"""Events for a webhook that was disabled for one of these reasons are still recorded, as cancelled deliveries.

The webhook's owner can resend these deliveries after enabling the webhook.
"""
RECORDED_SECONDS = 14 * 86_400.0  # since the webhook was disabled


class _Follower(NamedTuple):
    id: str
    user_id: str
    filter: Mapping[str, str] | None
    since_seq: int
    is_active: bool


class WebhookFanOut:
    """Creates deliveries for events."""

    def __init__(self, database: Database, types: EventTypes, rights: EventRights, accounts: Accounts) -> None:
        self._database, self._work = database, database.work
        self._types, self._rights, self._accounts = types, rights, accounts

    async def create_cursor(self) -> None:
        """Store the end of the log as the position if no position is stored, so that no later event is missed."""
        if not await self._work(CURSOR.exists, entry=ENTRY, read=True):  # a start on a full disk only reads
            await self._work(CURSOR.create, entry=ENTRY)

    async def handle_new_events(self) -> None:
        """Handle all new events. If another process reads the same events first, leave the rest to that process."""

        async def read(limit: int) -> bool:
            return await self._work(functools.partial(self._read_batch, limit), entry=ENTRY)

        async def skip(reason: str) -> bool:
            return await self._work(functools.partial(self._count_failure, reason), entry=ENTRY)

        if not await self._database.read(CURSOR.is_behind, ENTRY):
            return
        with contextlib.suppress(PositionMoved):
            while await handle_next(read, skip, EVENTS_AT_ONCE):
                pass

    def has_events(self, patterns: Collection[str]) -> bool:
        """Return whether the log has events after the stored position that match the patterns.

        Also return True if the position is far behind the end of the log. Runs in a unit of work.
        """
        row = ConsumerRow.get_or_none(ConsumerRow.name == CONSUMER)
        if row is None or not patterns:
            return False
        is_new = (EventRow.seq > row.cursor) & EventRow.type.in_(self._types.expand(patterns))
        return bool(event_log.select([is_new, EventRow.seq <= row.cursor + WINDOW], 1)) or self._is_far_behind(row)

    @staticmethod
    def _is_far_behind(row: ConsumerRow) -> bool:
        return event_log.last_seq() - row.cursor >= WINDOW

    def _read_batch(self, limit: int) -> bool:
        """Handle the next events and advance the stored position. Return whether there may be more events."""
        position = CURSOR.position()
        newest = event_log.last_seq()  # read first, because later events must come after the position
        until = min(newest, position + WINDOW)
        events = self._next_events(position, until, limit)
        rows, handled = self._deliveries(events)
        is_whole = handled == len(events) < limit
        reached = until if is_whole else events[handled - 1].seq
        if reached == position:
            return False
        CURSOR.move(position, reached)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            Delivery.insert_many(rows[start : start + ROWS_AT_ONCE]).on_conflict_ignore().execute()
        return reached < newest

    def _next_events(self, position: int, until: int, limit: int) -> list[LoggedEvent]:
        names = self._types.expand(followed_patterns())
        where = [EventRow.seq > position, EventRow.seq <= until, EventRow.type.in_(names)]
        return event_log.select(where, limit) if names else []

    def _count_failure(self, reason: str) -> bool:
        """Count a failure to handle the next event.

        Return whether the event was skipped because it failed too often.
        """
        position = CURSOR.position()
        events = self._next_events(position, position + WINDOW, 1)
        return bool(events) and CURSOR.count_failure(position, events[0], reason)

    def _deliveries(self, events: Sequence[LoggedEvent]) -> tuple[list[dict[str, Any]], int]:
        """Return the rows of new deliveries, and the number of events that were handled.

        The events are handled in order until there are at least `ROWS_AT_ONCE` rows.
        """
        followers = _followers({pattern for event in events for pattern in matching_patterns(event.type)})
        people = {each.user_id for found in followers.values() for each in found}
        owners = self._accounts.principals_of(people) if people else {}
        if gone := people - owners.keys():
            disable_webhooks(Webhook.user_id.in_(gone), "owner_inactive")
        rows: list[dict[str, Any]] = []
        for count, event in enumerate(events, 1):
            rows += self._deliveries_of(event, followers, owners)
            if len(rows) >= ROWS_AT_ONCE:
                return rows, count
        return rows, len(events)

    def _deliveries_of(
        self, event: LoggedEvent, followers: Mapping[str, list[_Follower]], owners: Mapping[str, Principal]
    ) -> Iterable[dict[str, Any]]:
        found = {each.id: each for name in matching_patterns(event.type) for each in followers.get(name, ())}
        found = {key: each for key, each in found.items() if self._is_wanted(event, each, owners.get(each.user_id))}
        if not found:
            return
        payload, now = body_of_event(event), clock.now()
        subject = visibility_data_of(event)
        for each in found.values():
            due = now if each.is_active else None
            yield {
                "id": new_id(),
                "webhook_id": each.id,
                "event_id": event.id,
                "event": event.type,
                "subject": subject,
                "payload": payload,
                "status": "pending" if each.is_active else "cancelled",
                "attempts": [],
                "next_attempt_at": due,
                "due_at": due,
                "created_at": now,
                "finished_at": None if each.is_active else now,
            }

    def _is_wanted(self, event: LoggedEvent, follower: _Follower, owner: Principal | None) -> bool:
        if owner is None or event.seq <= follower.since_seq or event.object_id == follower.id:
            return False
        if not self._rights.can_read(owner, event):
            return False
        if not follower.filter:
            return True
        payload = event.payload()
        return all(payload.get(name) == value for name, value in follower.filter.items())


def followed_patterns() -> frozenset[str]:
    """Return the event names and patterns of all webhooks for which deliveries are created. Runs in a unit of work."""
    joined = Subscription.select(Subscription.pattern).join(Webhook, on=Webhook.id == Subscription.webhook_id)
    found: Any = joined.where(_receives_or_records_events()).distinct()
    return frozenset(pattern for (pattern,) in found.tuples())


def visibility_data_of(event: LoggedEvent) -> dict[str, Any]:
    """Return the data that each attempt uses to check again whether the webhook's owner may read the event."""
    return {
        "object_type": event.object_type,
        "object_id": event.object_id,
        "owner_id": event.owner_id,
        "visibility": event.visibility,
    }


def event_of(row: Delivery) -> LoggedEvent:
    """Return the event of a delivery in the form that the visibility check requires."""
    return LoggedEvent(
        seq=0, id=row.event_id, type=row.event, ts="", actor_type="", actor_id=None, data="", cause="", **row.subject
    )


def _receives_or_records_events() -> Any:
    is_recorded = Webhook.disabled_reason.in_(RECORDED_REASONS) & (Webhook.updated_at > clock.now(-RECORDED_SECONDS))
    return Webhook.is_active | is_recorded


def _followers(patterns: Collection[str]) -> dict[str, list[_Follower]]:
    """Return the webhooks that subscribe to each of the patterns, keyed by pattern."""
    columns = (Webhook.id, Webhook.user_id, Webhook.filter, Webhook.since_seq, Webhook.is_active, Subscription.pattern)
    joined = Webhook.select(*columns).join(Subscription, on=Webhook.id == Subscription.webhook_id)
    rows: Any = (
        joined.where(Subscription.pattern.in_(patterns) & _receives_or_records_events()).tuples() if patterns else ()
    )
    found: dict[str, list[_Follower]] = {}
    for *fields, pattern in rows:
        found.setdefault(pattern, []).append(_Follower(*fields))
    return found
