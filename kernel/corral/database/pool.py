"""Threads that run units of work: a bounded queue, lanes that take units from it, and a watchdog for hanging lanes.

A lane owns one connection. A unit that runs longer than `LOST_AFTER` seconds is lost: its lane is abandoned (the
connection is closed and an exception is raised in the thread), a new lane replaces it, and the other units of the same
transaction run again. The watchdog counts its own checks instead of elapsed time, like `corral.plugins.watchdog`, so a
process that was suspended loses no units. A route that repeatedly loses units is quarantined for a while. Losses do not
count against a route while the database itself does not answer.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import ctypes
import dataclasses
import logging
import math
import queue
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral import current_call
from corral.database.unit import Entry, Unit
from corral.errors import Unavailable
from corral.metrics.histogram import Histogram

if TYPE_CHECKING:
    from corral.database.engine import Database

log = logging.getLogger("corral.database")

QUEUE_LIMIT = 1000
SLOW_AFTER, LOST_AFTER, LOOK = 0.05, 2.0, 0.25
HOLD_SECONDS = 60.0
MAX_TRIES = 3
AT_FRAMES = 8

Future = asyncio.Future[Any] | concurrent.futures.Future[Any]


class UnitLost(BaseException):
    """Raised in the thread of a unit that ran too long. Not an `Exception`, so that no handler swallows the error."""


class Ticket:
    """A queued unit of work, and the future that receives its result."""

    __slots__ = ("entry", "fn", "future", "read", "since", "tries")

    def __init__(self, fn: Callable[[], Any], entry: Entry, future: Future, *, read: bool) -> None:
        self.fn, self.entry, self.future, self.read = fn, entry, future, read
        self.tries, self.since = 0, time.monotonic()


@dataclasses.dataclass(slots=True, eq=False)
class Outcome:
    """The result of a ticket: a value or an exception."""

    ticket: Ticket
    unit: Unit | None
    value: Any = None
    error: BaseException | None = None

    def resolve(self) -> None:
        """Resolve the ticket's future, unless it is already done because its caller stopped waiting."""
        future = self.ticket.future
        if future.done():
            return
        if self.error is None:
            future.set_result(self.value)
        else:
            future.set_exception(self.error)


class Lane(threading.Thread, abc.ABC):
    """A thread with its own connection. Subclasses implement how tickets run."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(name=f"corral-{pool.name}", daemon=True)
        self.pool = pool
        self.lock = threading.Lock()
        self.lost = False
        self.ticket: Ticket | None = None
        self.since, self.looks = 0.0, 0

    def run(self) -> None:
        current_call.lanes.add(threading.get_ident())
        try:
            self._serve()
        finally:
            current_call.lanes.discard(threading.get_ident())

    def _serve(self) -> None:
        while not self.lost:
            ticket = self.pool.queue.get()
            if ticket is None:
                break
            if self.pool.refused(ticket):
                continue
            try:
                self.handle(ticket)
            except UnitLost:
                break
            except BaseException:
                log.exception("a database lane failed")
                if not self.lost:
                    self.pool.deliver([Outcome(ticket, None, error=Unavailable("The database failed."))])
            if not self.lost:
                self.pool.release(ticket)
        try:
            self.close()
        except UnitLost:  # the exception was delivered only now
            self.close()

    def enter(self, ticket: Ticket) -> None:
        """Record that the unit of the ticket begins."""
        self.since, self.looks = time.monotonic(), 0
        self.ticket = ticket
        self.pool.timings.waits.observe(self.since - ticket.since)

    def leave(self) -> None:
        """Record that the unit ended. Raise `UnitLost` if the watchdog abandoned this lane."""
        with self.lock:
            ticket, self.ticket = self.ticket, None
            if self.lost:
                raise UnitLost
        took = time.monotonic() - self.since
        self.pool.timings.units.observe(took)
        if took > SLOW_AFTER and ticket is not None:
            log.warning("slow unit", extra={"unit": ticket.entry.label, "duration_ms": round(took * 1000)})

    def at(self) -> str:
        """Return the current stack of the thread, innermost frame first, for the log entry of a lost unit."""
        walk = traceback.walk_stack(sys._current_frames().get(self.ident or 0))
        frames = traceback.StackSummary.extract(walk, limit=AT_FRAMES, lookup_lines=False)
        return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)

    @abc.abstractmethod
    def handle(self, ticket: Ticket) -> None:
        """Run the ticket, and possibly further tickets from the queue, and deliver the outcomes."""

    def rerun(self) -> list[Ticket]:
        """Return the other tickets of the lost transaction, which must run again."""
        return []

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection. Called in the lane's own thread."""

    @abc.abstractmethod
    def sever(self) -> None:
        """Roll back and prevent all later writes of the lane. Called from another thread."""


class Timings:
    """Histograms of run times and waiting times of a database's units, and error counts by problem code."""

    def __init__(self) -> None:
        self.units, self.waits = Histogram(), Histogram()
        self.errors: Counter[str] = Counter()


class Pool:
    """A pool of `size` lanes that share one queue of at most `QUEUE_LIMIT` tickets."""

    def __init__(self, name: str, size: int, make: Callable[[Pool], Lane], database: Database) -> None:
        self.name, self.make, self.ping = name, make, database.ping
        self.deliver, self.timings = database.deliver, database.timings
        self.queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._losses: dict[str, float] = {}  # by route label: when the route last lost a unit
        # By route label: the end of the quarantine, whether a trial uni
        self._held: dict[str, tuple[float, bool, dict[str, str]]] = {}
        self.plugin_by_label: Mapping[str, str] = {}  # the units of each plugin occupy at most half of the lanes
        self._share, self._busy = max(1, size // 2), Counter[str]()
        self._waiting: dict[str, deque[Ticket]] = defaultdict(deque)
        self._counting = threading.Lock()
        self.lanes = [make(self) for _ in range(size)]
        self.closed = threading.Event()
        for lane in self.lanes:
            lane.start()
        threading.Thread(target=self._watch, name=f"corral-{name}-watchdog", daemon=True).start()

    def submit(self, ticket: Ticket) -> None:
        """Queue the ticket. Raise `Unavailable` (`overloaded`) when the queue is full."""
        if self.queue.qsize() >= QUEUE_LIMIT:
            raise Unavailable("Too many requests wait for the database.", code="overloaded")
        if self._held:
            self._refuse_held(ticket)
        plugin = self.plugin_by_label.get(ticket.entry.label)
        if plugin is None or self._enter(plugin, ticket):
            self.queue.put(ticket)

    def _refuse_held(self, ticket: Ticket) -> None:
        """Reject the ticket while its route is quarantined.

        After the quarantine one trial unit is admitted first. All units are admitted again if the trial unit is not
        lost.
        """
        label = ticket.entry.label
        until, tried, culprit = self._held.get(label, (0.0, True, {}))
        if ticket.since < until:
            raise self._told(label)
        if tried:
            self._held.pop(label, None)
        else:
            self._held[label] = (ticket.since + 2 * LOST_AFTER, True, culprit)

    def refused(self, ticket: Ticket) -> bool:
        """Answer the ticket with an error if its route was quarantined while the ticket was queued.

        Return whether it was.
        """
        label = ticket.entry.label
        if label not in self._held or ticket.since >= self._losses[label]:
            return False
        self.deliver([Outcome(ticket, None, error=self._told(label))])
        self.release(ticket)
        return True

    def _told(self, label: str) -> Unavailable:
        until, _, culprit = self._held[label]
        wait, told = max(1, math.ceil(until - time.monotonic())), f"{label} ran too long twice and is held."
        return Unavailable(told, code="plugin_failed", retry_after=wait, **culprit)

    def _enter(self, plugin: str, ticket: Ticket) -> bool:
        """Return whether the plugin may run the ticket now.

        Otherwise queue the ticket until another unit of the plugin ends.
        """
        with self._counting:
            if self._busy[plugin] < self._share:
                self._busy[plugin] += 1
                return True
            if len(self._waiting[plugin]) >= QUEUE_LIMIT:
                raise Unavailable(f"Too many requests wait for the plugin {plugin}.", code="overloaded")
            self._waiting[plugin].append(ticket)
            return False

    def release(self, ticket: Ticket) -> None:
        """Record that the ticket has ended, and start the next waiting unit of the same plugin."""
        plugin = self.plugin_by_label.get(ticket.entry.label)
        if plugin is None:
            return
        with self._counting:
            if self._waiting[plugin]:
                self.queue.put(self._waiting[plugin].popleft())
            else:
                self._busy[plugin] -= 1

    @property
    def busy(self) -> int:
        """The number of lanes that are running a unit."""
        return sum(lane.ticket is not None for lane in self.lanes)

    def close(self) -> None:
        """Finish the queued tickets and stop the lanes."""
        self.closed.set()
        for _ in self.lanes:
            self.queue.put(None)
        for lane in self.lanes:
            lane.join(timeout=LOST_AFTER + 3)

    def _watch(self) -> None:
        while not self.closed.wait(LOOK):
            for index, lane in enumerate(self.lanes):
                lane.looks += 1
                if lane.ticket is not None and lane.looks * LOOK > LOST_AFTER:
                    self._lose(index, lane)

    def _lose(self, index: int, lane: Lane) -> None:
        with lane.lock:
            ticket = lane.ticket
            if ticket is None or time.monotonic() - lane.since <= LOST_AFTER:  # the lane runs another unit by now
                return
            lane.lost = True
            again = lane.rerun()
            began, now = lane.since, time.monotonic()
        inside, at = current_call.inside(lane.ident or 0), lane.at()
        label, took, culprit = ticket.entry.label, round(LOST_AFTER * 1000), dict[str, str]()
        if inside is not None and not current_call.awaits_database(lane.ident or 0):
            culprit["plugin"] = inside.contributed.plugin
            current_call.give_up(lane.ident or 0, inside, UnitLost)
        counts = ticket.entry.request_id is not None and (inside is None or not inside.contributed.blamed)
        log.error("unit lost", extra={"unit": label, "duration_ms": took, "at": at, **culprit})
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(lane.ident or 0), ctypes.py_object(UnitLost))
        lane.sever()
        self.lanes[index] = fresh = self.make(self)
        for other in again:
            self.queue.put(other)
        fresh.start()
        self.release(ticket)
        error = Unavailable("The operation ran too long and was rolled back.", retry_after=1, **culprit)

        def answer() -> None:  # after the loss was counted, so that the client's next request sees the quarantine
            if counts:
                self._count(label, began, now, culprit)
            self.deliver([Outcome(ticket, None, error=error)])

        threading.Thread(target=answer, daemon=True).start()  # the check of the database may block

    def _count(self, label: str, began: float, lost: float, culprit: dict[str, str]) -> None:
        """Count a lost unit against its route if the database still answers."""
        try:
            self.ping()
        except Exception:
            return
        last = self._losses.get(label, began - HOLD_SECONDS)
        if label in self._held or began - HOLD_SECONDS < last < began:
            self._held[label] = (lost + HOLD_SECONDS, False, culprit)
        elif last >= began:
            # Losses at the same time count as one, dated by the first. If the later loss replaced the earlier one,
            # overlapping lanes would never reach two losses.
            lost = min(last, lost)
        self._losses[label] = lost
