"""Threads that run units: a bounded queue, lanes that take from it, and a watchdog that gives up a lane that hangs.

A lane owns one connection. A unit that runs longer than `LOST_AFTER` seconds is lost: its lane is abandoned (connection
closed, exception raised in the thread), a fresh lane takes its place, and the units that shared the transaction run
again. Time is counted in looks, as by `corral.plugins.watchdog`: a process that stood still loses nothing. A route
that loses one unit after the other is held for a while; a database that answers nobody is no route's fault.
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
    """Raised in the thread of a unit that ran too long; not an `Exception`, so that no handler swallows it."""


class Ticket:
    """A queued unit, and the future that receives its result."""

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
        """Resolve the future, unless its caller has gone."""
        future = self.ticket.future
        if future.done():
            return
        if self.error is None:
            future.set_result(self.value)
        else:
            future.set_exception(self.error)


class Lane(threading.Thread, abc.ABC):
    """A thread with its own connection. Subclasses run tickets."""

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
        except UnitLost:  # told only now
            self.close()

    def enter(self, ticket: Ticket) -> None:
        """Note that the unit of the ticket begins."""
        self.since, self.looks = time.monotonic(), 0
        self.ticket = ticket
        self.pool.timings.waits.observe(self.since - ticket.since)

    def leave(self) -> None:
        """Note that the unit has ended. Raises `UnitLost` if the watchdog has given it up."""
        with self.lock:
            ticket, self.ticket = self.ticket, None
            if self.lost:
                raise UnitLost
        took = time.monotonic() - self.since
        self.pool.timings.units.observe(took)
        if took > SLOW_AFTER and ticket is not None:
            log.warning("slow unit", extra={"unit": ticket.entry.label, "duration_ms": round(took * 1000)})

    def at(self) -> str:
        """The current stack of the thread, innermost frame first, for the log entry of a lost unit."""
        walk = traceback.walk_stack(sys._current_frames().get(self.ident or 0))
        frames = traceback.StackSummary.extract(walk, limit=AT_FRAMES, lookup_lines=False)
        return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)

    @abc.abstractmethod
    def handle(self, ticket: Ticket) -> None:
        """Run the ticket, and possibly more of the queue, and deliver the outcomes."""

    def rerun(self) -> list[Ticket]:
        """The other tickets of the lost transaction, which must run again."""
        return []

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection from this thread."""

    @abc.abstractmethod
    def sever(self) -> None:
        """From another thread: roll back, and prevent all later writes of the lane."""


class Timings:
    """Durations and waiting times of the units of a database, and failures by the code of the problem."""

    def __init__(self) -> None:
        self.units, self.waits = Histogram(), Histogram()
        self.errors: Counter[str] = Counter()


class Pool:
    """`size` lanes on one queue of at most `QUEUE_LIMIT` tickets."""

    def __init__(self, name: str, size: int, make: Callable[[Pool], Lane], database: Database) -> None:
        self.name, self.make, self.ping = name, make, database.ping
        self.deliver, self.timings = database.deliver, database.timings
        self.queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._losses: dict[str, float] = {}  # by label of a route: when it lost its last unit
        self._held: dict[str, tuple[float, bool, dict[str, str]]] = {}  # until when, whether one went first, who did it
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
        """Queue the ticket; `overloaded` when the queue is full."""
        if self.queue.qsize() >= QUEUE_LIMIT:
            raise Unavailable("Too many requests wait for the database.", code="overloaded")
        if self._held:
            self._refuse_held(ticket)
        plugin = self.plugin_by_label.get(ticket.entry.label)
        if plugin is None or self._enter(plugin, ticket):
            self.queue.put(ticket)

    def _refuse_held(self, ticket: Ticket) -> None:
        """A held route is let in again after a while: one unit at first, and all when that was not lost."""
        label = ticket.entry.label
        until, tried, culprit = self._held.get(label, (0.0, True, {}))
        if ticket.since < until:
            raise self._told(label)
        if tried:
            self._held.pop(label, None)
        else:
            self._held[label] = (ticket.since + 2 * LOST_AFTER, True, culprit)

    def refused(self, ticket: Ticket) -> bool:
        """Whether its route came to be held while it waited; then it is answered."""
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
        """Whether the plugin may run the ticket now; if not, the ticket waits until another of its units ends."""
        with self._counting:
            if self._busy[plugin] < self._share:
                self._busy[plugin] += 1
                return True
            if len(self._waiting[plugin]) >= QUEUE_LIMIT:
                raise Unavailable(f"Too many requests wait for the plugin {plugin}.", code="overloaded")
            self._waiting[plugin].append(ticket)
            return False

    def release(self, ticket: Ticket) -> None:
        """Let the next unit of the ticket's plugin start, now that the ticket has ended."""
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
        """The number of lanes that run a unit."""
        return sum(lane.ticket is not None for lane in self.lanes)

    def close(self) -> None:
        """Finish the queued tickets and end the lanes."""
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
            if ticket is None or time.monotonic() - lane.since <= LOST_AFTER:  # another one by now
                return
            lane.lost = True
            again = lane.rerun()
            began, now = lane.since, time.monotonic()
        inside, at = current_call.inside(lane.ident or 0), lane.at()
        label, took, culprit = ticket.entry.label, round(LOST_AFTER * 1000), dict[str, str]()
        if inside is not None and not current_call.awaits_database(lane.ident or 0):
            culprit["plugin"] = inside.contributed.plugin
            current_call.give_up(lane.ident or 0, inside, UnitLost)
        if ticket.entry.request_id is not None and (inside is None or not inside.contributed.blamed):
            threading.Thread(target=self._count, args=(label, began, now, culprit), daemon=True).start()
        log.error("unit lost", extra={"unit": label, "duration_ms": took, "at": at, **culprit})
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(lane.ident or 0), ctypes.py_object(UnitLost))
        lane.sever()
        self.lanes[index] = fresh = self.make(self)
        for other in again:
            self.queue.put(other)
        fresh.start()
        self.release(ticket)
        error = Unavailable("The operation ran too long and was rolled back.", retry_after=1, **culprit)
        self.deliver([Outcome(ticket, None, error=error)])

    def _count(self, label: str, began: float, lost: float, culprit: dict[str, str]) -> None:
        """Count the lost unit of a route, if the database answers others. In a thread: it may take a while to tell."""
        try:
            self.ping()
        except Exception:
            return
        last = self._losses.get(label, began - HOLD_SECONDS)
        if label in self._held or began - HOLD_SECONDS < last < began:
            self._held[label] = (lost + HOLD_SECONDS, False, culprit)
        elif last >= began:  # lost together, they are one loss: the first, or lanes that overlap would never lose twice
            lost = min(last, lost)
        self._losses[label] = lost
