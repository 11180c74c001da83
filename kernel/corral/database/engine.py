"""The interface of a database: `work()` runs a function as one unit of work on either engine."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import logging
import sqlite3
import sys
import threading
from collections.abc import Callable
from typing import ClassVar, Protocol, TypeVar

import peewee

from corral.database.pool import DatabasePool, QueuedUnit, Timings
from corral.database.unit import SYSTEM_CONTEXT, Unit, UnitContext, refuse_nesting
from corral.errors import Problem, Unavailable
from corral.watchdog import Watchdog

log = logging.getLogger("corral.database")
T = TypeVar("T")


class Work(Protocol):
    """A service for async handlers and jobs that runs a function as one unit of work: `await work(fn)`.

    With `read=True`, writes are refused. `fn` may run more than once, so it must have no effect outside the database.
    Exceptions that `fn` raises propagate to the caller. Raises `NestedUnit` inside a unit, and `Unavailable` if the
    database is unavailable.
    """

    async def __call__(self, fn: Callable[[], T], *, entry: UnitContext = SYSTEM_CONTEXT, read: bool = False) -> T: ...


class InlineReadTimeout(Exception):
    """Raised when a read-only unit of work on the event loop exceeds its time limit.

    The caller should then run it in the pool.
    """


class Database(abc.ABC):
    """The base class for the databases of both engines.

    `committed` is called after COMMIT.
    """

    kind: ClassVar[str]  # sqlite | postgresql; for this package and the event log only
    is_file: ClassVar[bool]
    """Whether the database is a file that the processes of one machine share."""

    def __init__(self, engine: peewee.Database) -> None:
        self.engine = engine
        self.timings, self.watchdog = Timings(), Watchdog()
        self.pools: list[DatabasePool] = []
        """One pool for units that write and another for units that only read, or a single pool for both."""
        self.committed: Callable[[list[Unit]], None] = lambda units: None
        self.jobs: frozenset[str] | None = None  # the declared jobs; None without a kernel
        self.cursor_key = b""  # the key that signs list cursors; set at boot
        self.plugin_by_label: dict[str, str] = {}  # units of one plugin occupy at most half of the threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed, self._closing = False, threading.Lock()

    def deliver_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver the results and notifications of all database threads on this event loop."""
        self._loop = loop

    async def work(self, fn: Callable[[], T], *, entry: UnitContext = SYSTEM_CONTEXT, read: bool = False) -> T:
        """Run `fn` as one unit of work in a thread of the pool and wait for its COMMIT. See `Work`."""
        refuse_nesting()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self.deliver_on(loop)
        future: asyncio.Future[T] = loop.create_future()
        self._submit(QueuedUnit(fn, entry, future, read=read))
        return await future

    def run(self, fn: Callable[[], T], *, entry: UnitContext = SYSTEM_CONTEXT, read: bool = False) -> T:
        """Run `fn` as one unit of work and block until its COMMIT. Use this method in threads without an event loop."""
        refuse_nesting()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._submit(QueuedUnit(fn, entry, future, read=read))
        return future.result()

    def read_now(self, fn: Callable[[], T], entry: UnitContext) -> T:
        """Run a short read-only unit of work in the calling thread.

        Raise `InlineReadTimeout` if it takes too long, or if the engine cannot run units of work in this way.
        """
        raise InlineReadTimeout

    async def read(self, fn: Callable[[], T], entry: UnitContext) -> T:
        """Run a short read-only unit of work on the event loop if the engine supports this, otherwise in the pool."""
        try:
            return self.read_now(fn, entry)
        except InlineReadTimeout:
            return await self.work(fn, entry=entry, read=True)

    @abc.abstractmethod
    def ping(self) -> None:
        """Execute a trivial query on a new connection. Raises an exception if the database is unavailable."""

    def waiting(self) -> int:
        """Return the number of units of work that are waiting for a connection."""
        return sum(pool.queue.qsize() for pool in self.pools)

    def connection_usage(self) -> tuple[int, int]:
        """Return the number of connections in use, and the total number of connections."""
        threads = [thread for pool in self.pools for thread in pool.threads]
        return sum(thread.running is not None for thread in threads), len(threads)

    def close_loop_connection(self) -> None:
        """Close the connection of the event loop's thread.

        Call this method in that thread, because `close` runs in another thread and cannot close this connection.
        """
        self.engine.close()

    def close(self) -> None:
        """Finish queued units of work, and close the connections of the pools and of the calling thread."""
        with self._closing:  # units that are already queued still run
            if self._is_closed:
                return
            self._is_closed = True
        for pool in self.pools:
            pool.close()
        self.close_loop_connection()
        self.watchdog.stop()

    def _submit(self, queued: QueuedUnit) -> None:
        with self._closing:
            if self._is_closed:  # no thread would run the unit
                raise Unavailable("The database is closed.", code="shutting_down")
            self.pools[-1 if queued.read else 0].submit(queued)

    def deliver(self, ended: list[QueuedUnit]) -> None:
        """Resolve the futures of a batch of units of work, run the units' callbacks, and announce new events.

        A thread of the pool calls this method after COMMIT.
        """
        units = [each.unit for each in ended if each.unit is not None and each.error is None]
        self.timings.errors.update(each.error.code for each in ended if isinstance(each.error, Unavailable))
        if self._loop is None or self._loop.is_closed():
            self._finish(units, [])
        else:
            waiting = [each for each in ended if isinstance(each.future, asyncio.Future)]
            with contextlib.suppress(RuntimeError):  # the event loop has just ended, so nothing waits for the results
                self._loop.call_soon_threadsafe(self._finish, units, waiting)
        for each in ended:
            if isinstance(each.future, concurrent.futures.Future):
                each.resolve()

    def _finish(self, units: list[Unit], ended: list[QueuedUnit]) -> None:
        callbacks = [call for unit in units for call in unit.after]
        for call in (*callbacks, *[each.resolve for each in ended]):
            try:
                call()
            except Exception:  # a result cannot be delivered if the event loop that awaits it has ended
                log.exception("a callback or the delivery of a result failed after a commit")
        if units:
            self.committed(units)


def translate_error(error: BaseException) -> BaseException:
    """Return the `Problem` for a failure of the database, such as a lost connection or a full disk.

    All other errors are returned unchanged, including the database errors that statements cause, such as a violated
    constraint.
    """
    psycopg = sys.modules.get("psycopg")  # it may not be installed
    if psycopg is not None and isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return Unavailable("The database cannot be reached; try again later.", retry_after=2)
    if isinstance(error, Problem) or not isinstance(
        error, (peewee.DatabaseError, peewee.InterfaceError, sqlite3.Error)
    ):
        return error
    ours = (peewee.IntegrityError, peewee.ProgrammingError, peewee.DataError, sqlite3.IntegrityError)
    raised = error if isinstance(error, sqlite3.Error) else error.__cause__ or error.__context__
    # SQLite reports an invalid statement, for example because a table is missing, as an operational error.
    if isinstance(error, ours) or getattr(raised, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
        return error
    text = str(error).lower()
    if "readonly" in text or "read-only" in text:
        return error  # a read unit that writes is a bug in its handler
    problem = Unavailable("The database cannot be reached; try again later.", retry_after=2)
    if "full" in text or "disk i/o" in text or "no space" in text:
        problem = Unavailable("The database's disk is full or failing; try again.", code="storage_full", retry_after=10)
    elif "locked" in text or "busy" in text or "interrupt" in text:
        problem = Unavailable("The database is busy; try again.", code="overloaded")
    problem.__cause__ = error
    return problem
