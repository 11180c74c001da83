"""The connection pool: threads that each own one connection and run units of work from a shared bounded queue.

If a unit runs longer than `LOST_AFTER` seconds, its thread is abandoned: the connection is closed, and
`corral.watchdog` raises an exception in the thread. A new thread replaces the abandoned one. On SQLite, where several
units share a transaction, the other units of the transaction run again. If two units of the same route are abandoned,
the route is quarantined for a while, unless the database itself does not answer.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import math
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.database.unit import Unit, UnitContext, run_in_unit, write_collected
from corral.errors import Unavailable
from corral.metrics.histogram import Histogram
from corral.thread_shares import ThreadShares
from corral.watchdog import CHECK_SECONDS, ThreadAbandoned, inspect_stack, running_call_of

if TYPE_CHECKING:
    from corral.database.engine import Database

log = logging.getLogger("corral.database")

QUEUE_LIMIT = 1000
SLOW_AFTER, LOST_AFTER = 0.05, 2.0
QUARANTINE_SECONDS = 60.0
MAX_TRIES = 3
STACK_FRAMES = 8

Future = asyncio.Future[Any] | concurrent.futures.Future[Any]


class QueuedUnit:
    """A unit of work that is waiting for a thread, with the future that receives its result: a value or an error."""

    __slots__ = ("entry", "error", "fn", "future", "queued_at", "read", "tries", "unit", "value")

    def __init__(self, fn: Callable[[], Any], entry: UnitContext, future: Future, *, read: bool) -> None:
        self.fn, self.entry, self.future, self.read = fn, entry, future, read
        self.tries, self.queued_at = 0, time.monotonic()
        self.unit: Unit | None = None
        self.value: Any = None
        self.error: BaseException | None = None

    def resolve(self) -> None:
        """Resolve the future, unless the code that awaits it has stopped waiting."""
        if not self.future.done():
            if self.error is None:
                self.future.set_result(self.value)
            else:
                self.future.set_exception(self.error)


class DatabaseThread(threading.Thread, abc.ABC):
    """A thread with its own connection. Subclasses implement the execution of units of work."""

    def __init__(self, pool: DatabasePool) -> None:
        super().__init__(name=f"corral-{pool.name}", daemon=True)
        self.pool, self.database = pool, pool.database
        self.connection: Any = None
        self.lock, self.lost = threading.Lock(), False
        self.running: QueuedUnit | None = None
        self.batch: list[QueuedUnit] = []  # the units that have ended in the current transaction
        self.is_sharing = False  # whether they share the writes for which they have collected items
        self.began, self.checks = 0.0, 0

    def run(self) -> None:
        while not self.lost:
            queued = self.pool.queue.get()
            if queued is None:  # pass it on, behind the units that were queued after it
                self.pool.queue.put(None)
                if self.pool.queue.qsize() <= 1:
                    break
                continue
            if self.pool.refuse_quarantined(queued):
                continue
            try:
                ended = self.run_units(queued)
            except ThreadAbandoned:
                break
            except BaseException:
                log.exception("a database thread failed")
                queued.error, ended = Unavailable("The database operation failed unexpectedly; try again."), [queued]
            if not self.lost:
                self.pool.release(queued)  # first, so that the caller's next unit finds this thread and starts no other
                self.database.deliver(ended)
        try:
            self._end_thread()
        except ThreadAbandoned:  # the exception was delivered only now
            self._end_thread()

    def _end_thread(self) -> None:
        self.database.watchdog.mark_returned(self)
        self.close()

    def record_unit_start(self, queued: QueuedUnit) -> None:
        """Record that a unit of work has started."""
        self.began, self.checks = time.monotonic(), 0
        self.running = queued
        self.database.timings.waits.observe(self.began - queued.queued_at)

    def record_unit_end(self) -> None:
        """Record that the unit of work has ended. Raise `ThreadAbandoned` if the watchdog abandoned this thread."""
        with self.lock:
            queued, self.running = self.running, None
            if self.lost:
                raise ThreadAbandoned
        took = time.monotonic() - self.began
        self.database.timings.units.observe(took)
        if took > SLOW_AFTER and queued is not None:
            log.warning("slow unit", extra={"unit": queued.entry.label, "duration_ms": round(took * 1000)})

    def run_unit(self, unit: Unit, queued: QueuedUnit) -> Any:
        """Run the function of a unit of work, and write everything that the unit must write before COMMIT."""

        def run() -> Any:
            value = queued.fn()
            if not unit.read_only:
                if not unit.is_open():
                    raise RuntimeError("the unit of work caught a statement's error, which had ended the transaction")
                unit.finish()
                if not self.is_sharing:
                    write_collected(unit.collected)
            return value

        return run_in_unit(unit, run)

    def stack(self) -> str:
        """Return the stack of the thread, innermost frame first, for logging a unit of work that ran too long."""
        extract = functools.partial(traceback.StackSummary.extract, limit=STACK_FRAMES, lookup_lines=False)
        frames = inspect_stack(self.ident or 0, lambda frame: extract(traceback.walk_stack(frame)))
        return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)

    @abc.abstractmethod
    def run_units(self, queued: QueuedUnit) -> list[QueuedUnit]:
        """Run the unit of work, and possibly further units from the queue, and return those that have ended."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection. The thread itself calls this method."""

    @abc.abstractmethod
    def sever_connection(self) -> None:
        """Roll back and prevent all later writes by this thread. Another thread calls this method."""


class Timings:
    """Histograms of the run times and waiting times of units of work, and counts of errors by problem code."""

    def __init__(self) -> None:
        self.units, self.waits = Histogram(), Histogram()
        self.errors: Counter[str] = Counter()


class RouteQuarantine:
    """Refuses a route's units of work for `QUARANTINE_SECONDS` after two of them ran too long.

    The second one counts only if it began after the first one was abandoned, and less than `QUARANTINE_SECONDS` later.
    """

    def __init__(self) -> None:
        self.last_loss: dict[str, float] = {}
        self._quarantined: dict[str, tuple[float, dict[str, str]]] = {}

    def problem(self, label: str) -> Unavailable | None:
        """Return the error for units of work of this route while the route is quarantined, otherwise None."""
        until, plugin = self._quarantined.get(label, (0.0, {}))
        if not until or (wait := until - time.monotonic()) <= 0:
            return None
        detail = f"{label} ran too long twice and is refused for {QUARANTINE_SECONDS:g} s."
        return Unavailable(detail, code="plugin_failed", retry_after=math.ceil(wait), **plugin)

    def count(self, label: str, began: float, lost: float, plugin: dict[str, str]) -> None:
        """Count a unit of work that ran too long and was rolled back.

        `began` and `lost` are the monotonic times at which the unit of work began and was abandoned. `plugin`
        identifies the plugin whose code was running.
        """
        last = self.last_loss.get(label, -math.inf)
        if began < last:  # units that are lost at the same time count once
            return
        self.last_loss[label] = lost
        if began - last < QUARANTINE_SECONDS:
            self._quarantined[label] = (lost + QUARANTINE_SECONDS, plugin)


class DatabasePool:
    """A pool of `size` threads that share one queue of at most `QUEUE_LIMIT` units of work.

    The pool starts another thread, which opens its own connection, when there are more unfinished units than threads.
    """

    def __init__(self, name: str, size: int, make: type[DatabaseThread], database: Database) -> None:
        self.name, self.make, self.database = name, make, database
        self.queue: queue.SimpleQueue[QueuedUnit | None] = queue.SimpleQueue()
        self.plugin_by_label: Mapping[str, str] = database.plugin_by_label if size > 1 else {}
        self._shares: ThreadShares[QueuedUnit] = ThreadShares(size)
        self.quarantine = RouteQuarantine()
        self.threads = [make(self) for _ in range(size)]
        self._starting = threading.Lock()
        self._started = self._unfinished = 0
        self.database.watchdog.checks.append(self._abandon_overdue_units)

    def submit(self, queued: QueuedUnit) -> None:
        """Queue the unit of work. Raise `Unavailable` (`overloaded`) when the queue is full."""
        if self.queue.qsize() >= QUEUE_LIMIT:
            raise Unavailable("Too many requests are waiting for the database; try again.", code="overloaded")
        plugin = self.plugin_by_label.get(queued.entry.label)
        if plugin is not None and self._shares.waiting(plugin) >= QUEUE_LIMIT:
            raise Unavailable(f"Too many requests are waiting for the plugin {plugin}; try again.", code="overloaded")
        if plugin is None or self._shares.acquire(plugin, queued):
            self._put(queued)

    def _put(self, queued: QueuedUnit) -> None:
        self.queue.put(queued)
        with self._starting:
            self._unfinished += 1
            if self._started < min(self._unfinished, len(self.threads)):
                self.threads[self._started].start()
                self._started += 1

    def refuse_quarantined(self, queued: QueuedUnit) -> bool:
        """Refuse the unit of work if its route is quarantined, and return whether it was refused."""
        if (problem := self.quarantine.problem(queued.entry.label)) is not None:
            queued.error = problem
            self.database.deliver([queued])
            self.release(queued)
        return problem is not None

    def release(self, queued: QueuedUnit) -> None:
        """Record that the unit of work has ended, and queue the next waiting unit of the same plugin."""
        with self._starting:
            self._unfinished -= 1
        plugin = self.plugin_by_label.get(queued.entry.label)
        if plugin is not None and (waiting := self._shares.release(plugin)) is not None:
            self._put(waiting)

    def close(self) -> None:
        """Finish all units of work and stop the threads.

        Units that are not queued yet because their plugin already uses its whole share of the threads are also
        finished.
        """
        self.queue.put(None)
        for thread in self.threads[: self._started]:
            thread.join(timeout=LOST_AFTER + 3)

    def _abandon_overdue_units(self) -> None:
        for index, thread in enumerate(self.threads):
            thread.checks += 1
            if (queued := thread.running) is not None and thread.checks * CHECK_SECONDS > LOST_AFTER:
                self._abandon_unit(index, thread, queued)

    def _abandon_unit(self, index: int, thread: DatabaseThread, queued: QueuedUnit) -> None:
        with thread.lock:
            if thread.running is not queued:  # it has ended meanwhile
                return
            thread.lost = True
            guard, stack = getattr(running_call_of(thread.ident or 0), "guard", None), thread.stack()
            self.database.watchdog.abandon(thread, guard)  # while it cannot end, and another have its number
        label, began, lost = queued.entry.label, thread.began, time.monotonic()
        plugin = {} if guard is None else {"plugin": guard.plugin}
        took = round((lost - began) * 1000)
        log.error("unit lost", extra={"unit": label, "duration_ms": took, "stack": stack, **plugin})
        if guard is not None:
            guard.count_lost_call()
        thread.sever_connection()
        self.threads[index] = replacement = self.make(self)
        for other in thread.batch:  # rolled back as well
            self.queue.put(other)
        replacement.start()
        self.release(queued)
        is_route = queued.entry.request_id is not None and (guard is None or not guard.counts)
        answered = QueuedUnit(queued.fn, queued.entry, queued.future, read=queued.read)  # the thread has the other one
        answered.error = Unavailable("The operation took too long and was rolled back.", retry_after=1, **plugin)

        def answer() -> None:  # after the loss was counted, so that the client's next request sees the quarantine
            if is_route:
                with contextlib.suppress(Exception):  # if the database does not answer, the route is not to blame
                    self.database.ping()
                    self.quarantine.count(label, began, lost, plugin)
            self.database.deliver([answered])

        threading.Thread(target=answer, daemon=True).start()  # the check of the database may block
