"""The public interface of the event log, for plugins that search the log, read all its events, or deliver them."""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from corral import clock
from corral.database.engine import Work
from corral.database.model import Model
from corral.database.unit import UnitContext
from corral.errors import ExpectedFailure, Unavailable
from corral.events import log as event_log
from corral.events.consumers import POISON_TRIES, ConsumerRow, poison_alert
from corral.events.event import emit
from corral.events.live_feed import Feed, wait_and_clear
from corral.events.log import EventRow, LoggedEvent
from corral.jobs.runner import JobRunner
from corral.redact.redactor import Redactor

log = logging.getLogger("corral.event_log")

POLL_SECONDS, DRAIN_SECONDS = 1.0, 20.0
BATCH_SIZE = 500
RETRY_SECONDS = 0.5
Claimed = TypeVar("Claimed")
Row = TypeVar("Row", bound=Model)


def last_seq_before(instant: str, low: int, high: int) -> int:
    """Return the last `seq` in `low..high` whose event is older than `instant`, or `low` if there is none.

    Event times are not indexed, so the function performs a binary search over `seq`. Runs in a unit of work.
    """
    first = _first_after(low)
    if first is None or first[1] >= instant:
        return low
    while low < high:
        middle = (low + high) // 2
        found = _first_after(middle)
        if found is None or found[0] > high or found[1] >= instant:
            high = middle
        else:
            low = found[0]
    return low


def _first_after(seq: int) -> tuple[int, str] | None:
    query = EventRow.select(EventRow.seq, EventRow.ts).where(EventRow.seq > seq).order_by(EventRow.seq).limit(1)
    row: tuple[int, str] | None = query.tuples().first()
    return row


class PositionMoved(ExpectedFailure):
    """Raised when another process has already moved the position. The current unit of work is rolled back."""


class LogCursor:
    """The stored position of a reader of the event log.

    If several processes try to move the position at the same time, only one of them succeeds. The position is stored as
    the cursor of a durable consumer, so events that have not been read are kept, and an event that fails repeatedly is
    skipped. Every method runs in the caller's unit of work.
    """

    def __init__(self, name: str) -> None:
        self._name, self._is_mine = name, ConsumerRow.name == name

    def exists(self) -> bool:
        """Return whether a position is stored."""
        return bool(ConsumerRow.select().where(self._is_mine).exists())

    def create(self) -> None:
        """Store the current end of the event log as the position, unless a position is already stored."""
        end = {"name": self._name, "cursor": event_log.last_seq(), "updated_at": clock.now()}
        ConsumerRow.insert(end).on_conflict_ignore().execute()

    def position(self) -> int:
        """Return the sequence number of the last handled event."""
        return int(ConsumerRow.get_by_id(self._name).cursor)

    def is_behind(self) -> bool:
        """Return whether the event log contains events after the stored position."""
        return event_log.last_seq() > self.position()

    def move(self, before: int, after: int) -> None:
        """Move the position from `before` to `after`. Raise `PositionMoved` if the stored position is not `before`.

        If `after` equals `before`, this method only checks the stored position.
        """
        changes: dict[str, Any] = {"cursor": after, "updated_at": clock.now()}
        if after > before:
            changes["failures"] = 0
        if not ConsumerRow.update(changes).where(self._is_mine & (ConsumerRow.cursor == before)).execute():
            raise PositionMoved

    def count_failure(self, before: int, event: LoggedEvent, reason: str) -> bool:
        """Count a failure of the first event after the position `before`. Return whether the event was skipped.

        After `POISON_TRIES` failures, the event is skipped and an alert is raised.
        """
        is_next = self._is_mine & (ConsumerRow.cursor == before)
        counted = ConsumerRow.update(failures=ConsumerRow.failures + 1).where(is_next).returning(ConsumerRow.failures)
        if not (rows := list(counted.execute())) or rows[0].failures < POISON_TRIES:
            return False
        self.move(before, event.seq)
        emit(poison_alert(self._name, event, reason), object=("consumer", self._name))
        return True


async def handle_next(
    read: Callable[[int], Awaitable[bool]], skip: Callable[[str], Awaitable[bool]], limit: int
) -> bool:
    """Handle the next events in one batch, or one by one if the batch fails. Return whether there may be more events.

    `read` handles at most the given number of events, and returns whether there may be more. `skip` counts a failure of
    the next event with the given reason, and returns whether the event was skipped (see `LogCursor.count_failure`).
    """
    try:
        return await read(limit)
    except (Unavailable, PositionMoved):
        raise
    except Exception:
        log.warning("a batch of events failed, retrying event by event", exc_info=True)
    for _ in range(limit):
        try:
            if not await read(1):
                return False
        except (Unavailable, PositionMoved):
            raise
        except Exception as error:
            log.warning("an event could not be handled", exc_info=True)
            if not await skip(str(error)):
                return False
    return True


class EventDispatcher(abc.ABC, Generic[Claimed]):
    """Delivers events: finds pending deliveries, and attempts each one in its own asyncio task.

    A subclass reads new events and claims deliveries in `run_once`, and passes each claimed delivery to `_start`.
    """

    what: ClassVar[str]
    """The name by which log lines refer to the delivered objects."""

    def __init__(self, work: Work, feed: Feed, runner: JobRunner) -> None:
        self._work, self._feed, self._runner = work, feed, runner
        self._wake_up = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._draining = False
        self._unwatch: Callable[[], None] = lambda: None

    @abc.abstractmethod
    async def run_once(self) -> float:
        """Store the deliveries that new events require, and start attempts for pending deliveries.

        Return the number of seconds until the next attempt. Raise `Unavailable` if the database cannot be used.
        """

    @abc.abstractmethod
    async def _attempt(self, claimed: Claimed) -> None:
        """Attempt a delivery and record the result.

        If the attempt is interrupted, release the delivery so that it can be attempted again.
        """

    @abc.abstractmethod
    def _is_relevant(self, event: LoggedEvent) -> bool:
        """Return whether the dispatcher must react to an event, by delivering it or by changing other deliveries."""

    def start(self) -> None:
        """Start watching the event feed."""
        self._unwatch = self._feed.watch(self._on_events)

    def wake(self) -> None:
        """Look for pending deliveries immediately. Call this method after storing deliveries outside the dispatcher."""
        self._wake_up.set()

    async def run(self) -> None:
        """Deliver events until cancelled, beginning when the job runner of this process has started.

        The kernel supervises this task.
        """
        await self._runner.started.wait()
        while not self._draining:
            try:
                seconds = await self.run_once()
            except Unavailable as problem:
                log.debug("nothing is dispatched", extra={"what": self.what, "detail": problem.detail})
                seconds = POLL_SECONDS
            await wait_and_clear(self._wake_up, seconds)
        await asyncio.Event().wait()  # the process ends

    @property
    def is_busy(self) -> bool:
        """Whether any attempts are running."""
        return bool(self._running)

    async def wait_until_idle(self) -> None:
        """Wait until all running attempts have ended."""
        while self._running:
            await asyncio.wait(self._running)

    async def drain(self) -> None:
        """Stop claiming deliveries, and wait at most `DRAIN_SECONDS` for the running attempts to end."""
        self._draining = True
        self._wake_up.set()
        if self._running:
            await asyncio.wait(self._running, timeout=DRAIN_SECONDS)

    async def stop(self) -> None:
        """Cancel the running attempts, which then release their deliveries."""
        self._draining = True
        self._unwatch()
        for task in [*self._running]:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _on_events(self, events: Sequence[LoggedEvent]) -> None:
        """Wake up if the dispatcher must react to one of the events. The event feed calls this method."""
        if any(self._is_relevant(event) for event in events):
            self._wake_up.set()

    def _start(self, claimed: Claimed) -> None:
        task = asyncio.get_running_loop().create_task(self._attempt(claimed))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake_up.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an attempt failed unexpectedly", exc_info=error, extra={"what": self.what})


class TableRedactorValues(abc.ABC, Generic[Row]):
    """Passes the credentials stored in a table to the redactor, at startup and after every change.

    A subclass specifies the table, which must have the columns `id` and `version`, and the events that announce changes
    to its rows.
    """

    source: ClassVar[str]
    """The name under which the values are registered with the redactor."""
    model: type[Row]
    changes: ClassVar[Collection[str]]
    entry: ClassVar[UnitContext]

    def __init__(self, work: Work, redactor: Redactor) -> None:
        self._work, self._redactor = work, redactor
        self._changed = asyncio.Event()
        self._opened: dict[tuple[str, int], Mapping[str, str]] = {}  # by id and version
        self.unreadable = 0
        """The number of rows whose credentials could not be decrypted."""
        self.known: frozenset[str] = frozenset()
        """The names of the credentials that are registered for redaction."""

    @abc.abstractmethod
    def _open(self, row: Row) -> Mapping[str, str]:
        """Return the decrypted credentials of a row, keyed by names that are unique among all rows. Runs in a thread.

        Raise `Unavailable` if a key is not loaded. The next refresh tries the row again, because another process may
        have re-encrypted it. Until a refresh succeeds, this process cannot decrypt the credentials, so it cannot reveal
        them either.
        """

    def _fixed_values(self) -> Mapping[str, str]:
        """Return additional credentials that are in no table and never change.

        The keys of the returned mapping must differ from all keys that `_open` returns.
        """
        return {}

    def on_events(self, events: Sequence[LoggedEvent]) -> None:
        """Wake up `run` if a row changed. The event feed calls this method."""
        if any(event.type in self.changes for event in events):
            self._changed.set()

    async def run(self) -> None:
        """Refresh the redactor after every change. Runs as a supervised task."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self.refresh()
            except Unavailable:
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def refresh(self) -> None:
        """Read the rows that have changed, and pass the credentials of all rows to the redactor."""
        listed = await self._list()
        missing = [key for key in listed if key not in self._opened]
        for start in range(0, len(missing), BATCH_SIZE):
            ids = [row_id for row_id, _ in missing[start : start + BATCH_SIZE]]
            rows = await self._work(lambda ids=ids: self._read(ids), entry=self.entry, read=True)  # type: ignore[misc]  # bound now
            self._opened |= await asyncio.to_thread(self._open_all, rows)
        self._opened = {key: values for key, values in self._opened.items() if key in listed}
        self.unreadable = len(listed) - len(self._opened)
        values = dict(self._fixed_values())
        values |= {name: value for found in self._opened.values() for name, value in found.items()}
        await asyncio.to_thread(self._redactor.set_values, self.source, values)
        self.known = frozenset(values)

    async def _list(self) -> set[tuple[str, int]]:
        found: set[tuple[str, int]] = set()
        after = ""
        while True:
            some = await self._work(lambda after=after: self._list_batch(after), entry=self.entry, read=True)  # type: ignore[misc]  # bound now
            found.update(some)
            if len(some) < BATCH_SIZE:
                return found
            after = some[-1][0]

    def _list_batch(self, after: str) -> list[tuple[str, int]]:
        table: Any = self.model
        rows = table.select(table.id, table.version).where(table.id > after).order_by(table.id).limit(BATCH_SIZE)
        return [(row.id, row.version) for row in rows]

    def _read(self, ids: Sequence[str]) -> list[Row]:
        table: Any = self.model
        return list(table.select().where(table.id.in_(ids)))

    def _open_all(self, rows: Sequence[Row]) -> dict[tuple[str, int], Mapping[str, str]]:
        opened: dict[tuple[str, int], Mapping[str, str]] = {}
        for row in rows:
            key: Any = row
            try:
                opened[key.id, key.version] = self._open(row)
            except Unavailable:
                continue
        return opened
