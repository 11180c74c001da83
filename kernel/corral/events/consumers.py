"""Durable consumers of the event log.

Each consumer has a row that stores its cursor. The cursor advances in the transaction in which the consumer handles the
events. A consumer handles each event at least once, in order, and in one process at a time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.leases import acquire_lease
from corral.database.model import InstantField, Model
from corral.database.statement import Statement
from corral.database.unit import SYSTEM, UnitContext
from corral.events import log as event_log
from corral.events.event import SystemAlert, emit
from corral.events.live_feed import Feed, wait_and_clear
from corral.events.log import LoggedEvent

log = logging.getLogger("corral.events")

LEASE_SECONDS = 8  # longer than any unit; after a kill, another process takes over within 10 s
BATCH = 50
LAG = 500  # events; a cursor further behind is advanced past events of other types
POISON_TRIES = 5
POLL_SECONDS = 1.0


class ConsumerRow(Model):
    """The position of a consumer in the event log."""

    name = peewee.CharField(primary_key=True, max_length=100)
    cursor = peewee.BigIntegerField(default=0)
    failures = peewee.IntegerField(default=0)
    updated_at = InstantField()

    class Meta:
        table_name = "kernel_consumers"


_POSITION = Statement(
    lambda p: ConsumerRow.select(ConsumerRow.cursor, event_log.LAST).where(ConsumerRow.name == p("name")).tuples()
)
_MOVE = Statement(
    lambda p: ConsumerRow.update(cursor=p("cursor"), failures=0, updated_at=p("now")).where(
        (ConsumerRow.name == p("name")) & (ConsumerRow.cursor == p("before"))
    )
)


class Subscriber(msgspec.Struct, frozen=True):
    """A durable consumer declared by a plugin.

    `handle(event: LoggedEvent, …services)` runs in the unit of work that advances the cursor. `events` contains event
    names, prefixes such as `task.*`, or `*`.
    """

    name: str  # <plugin>.<name>
    events: tuple[str, ...]
    handle: Callable[..., None]


class Consumer:
    """Passes events to one subscriber. `types` contains the names of these events.

    The subscriber's `handle` function is already guarded and bound to its services. While the plugin is out of service,
    `is_open` returns false, and the cursor does not advance.
    """

    def __init__(
        self, feed: Feed, subscriber: Subscriber, types: Sequence[str], holder: str, is_open: Callable[[], bool]
    ) -> None:
        self._database, self._feed, self.name, self._types = feed.database, feed, subscriber.name, types
        self._handle: Any = subscriber.handle
        self._seen: int | None = None  # the position of the feed when there was nothing to handle
        self._following = event_log.of_types(types)
        self._lease, self._holder, self._is_open = f"consumer:{self.name}", holder, is_open
        self._entry = UnitContext(label=f"consumer {self.name}", actor=SYSTEM)

    async def run(self) -> None:
        """Handle events as they are logged, until cancelled. The kernel runs this method in a supervised task."""
        with self._feed.subscribe(self._types) as notified:
            while True:
                while self._seen != self._feed.position and await self._handle_next_batch():
                    notified.clear()
                await wait_and_clear(notified, POLL_SECONDS)

    async def _handle_next_batch(self) -> bool:
        """Handle the next batch of events. If the batch fails, handle its events one by one.

        Return whether more events may follow.
        """
        work = functools.partial(self._database.work, entry=self._entry)
        position, is_open = self._feed.position, self._is_open()
        if not is_open or not await self._database.read(self._has_pending_work, self._entry):
            self._seen = position if is_open else None
            return False
        try:
            return await work(lambda: self._handle_next(BATCH, self._handle.call_uncounted))
        except Exception:
            log.warning("consumer batch failed, retrying event by event", extra={"consumer": self.name}, exc_info=True)
        for _ in range(BATCH):
            try:
                if not await work(lambda: self._handle_next(1, self._handle)):
                    return False
            except Exception as error:
                if not await work(functools.partial(self._count_failure, str(error))):
                    return False
        return True

    def _has_pending_work(self) -> bool:
        """Return whether this consumer must write to the database.

        A write is necessary if the cursor does not exist yet, if there are events to handle, or if the cursor lags far
        behind the end of the log. While the cursor lags, every poll scans the same events of other types again.
        """
        found = self._position()
        return found is None or found[1] - found[0] > LAG or bool(self._events_after(found[0], 1))

    def _position(self) -> Any:
        """Return the cursor and the end of the log, or None if the cursor does not exist yet."""
        return _POSITION.one({"name": self.name})

    def create_cursor(self) -> Any:
        """Create the cursor of a new consumer at the end of the log, and return its position.

        The kernel calls this method before requests are served, so that no later event is missed. Runs in the caller's
        unit of work.
        """
        end = {"name": self.name, "cursor": event_log.last_seq(), "updated_at": clock.now()}
        ConsumerRow.insert(**end).on_conflict_ignore().execute()
        return self._position()

    def _leased_position(self) -> Any:
        """Return the consumer's position if this process holds the consumer's lease, otherwise None."""
        is_ours = acquire_lease(self._lease, self._holder, LEASE_SECONDS)
        return (self._position() or self.create_cursor()) if is_ours else None

    def _events_after(self, cursor: int, limit: int) -> list[LoggedEvent]:
        return [LoggedEvent(*row) for row in self._following.rows({"after": cursor, "limit": limit})]

    def _handle_next(self, limit: int, handle: Callable[[LoggedEvent], Any]) -> bool:
        """Handle up to `limit` events and advance the cursor. Return whether more events may follow."""
        if (position := self._leased_position()) is None:
            return False
        cursor, newest = position  # read first, because later events must come after the cursor
        records = self._events_after(cursor, limit)
        for record in records:
            handle(record)
        is_full = len(records) == limit
        passed = records[-1].seq if is_full else max([newest, *[record.seq for record in records]])
        if records or passed - cursor > LAG:
            self._move_cursor(cursor, passed)
        return is_full

    def _count_failure(self, reason: str) -> bool:
        """Count a failure to handle the next event. Return True if the event was skipped.

        After `POISON_TRIES` failures, the event is skipped and an alert is emitted.
        """
        if (position := self._leased_position()) is None:
            return False
        counted = ConsumerRow.update(failures=ConsumerRow.failures + 1).where(ConsumerRow.name == self.name)
        if counted.returning(ConsumerRow.failures).execute()[0].failures < POISON_TRIES:
            return False
        if poison := self._events_after(position[0], 1):
            self._move_cursor(position[0], poison[0].seq)
            emit(poison_alert(self.name, poison[0], reason), object=("consumer", self.name))
        return True

    def _move_cursor(self, before: int, cursor: int) -> None:
        if not _MOVE.run({"name": self.name, "before": before, "cursor": cursor, "now": clock.now()}):
            raise RuntimeError(f"consumer {self.name}: another process moved its cursor")


def poison_alert(who: str, event: Any, reason: str, about: dict[str, str] | None = None) -> SystemAlert:
    """Return the alert about an event that is skipped after `POISON_TRIES` failures.

    `who` names the consumer that failed to handle the event, and `reason` is the error from the last attempt. `about`
    contains the `type` and `id` of the object that the alert concerns, by default the event.
    """
    detail = f"Event {event.id} ({event.type}) failed {POISON_TRIES} times: {reason[:500]}"
    title, about = f"{who} could not handle an event", about or {"type": "event", "id": event.id}
    return SystemAlert(kind="consumer_behind", severity="critical", title=title, detail=detail, object=about)
