"""SQLite: one writer thread with group commit, a few reader threads, and short reads on the event loop itself.

Every write transaction begins with BEGIN IMMEDIATE. Waiting units of work are committed together, and each one's result
is delivered after COMMIT. Sharing a COMMIT makes `synchronous=FULL` affordable. The items that the units of a batch
have collected are also written together, and the units have no savepoints, because a unit that fails before it has
changed a row (as most refused requests do) leaves nothing to undo. If a batch fails in any other way, it is rolled
back, and its units run again, each with its own savepoint and its own writes. The failure of one unit therefore makes
another unit run at most one more time (docs/adr/0028).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import peewee

from corral.database.engine import Database, InlineReadTimeout, translate_error
from corral.database.pool import DatabasePool, DatabaseThread, QueuedUnit
from corral.database.unit import Unit, UnitContext, refuse_nesting, run_in_unit, write_collected
from corral.errors import Unavailable
from corral.watchdog import ThreadAbandoned

T = TypeVar("T")

SHARED_WRITES = UnitContext("shared writes")
BATCH_UNITS, BATCH_SECONDS, SMALL_BATCH = 64, 0.010, 4
BUSY_TIMEOUT_MS, BUSY_POLL_SECONDS = 5000, 0.001
CUT_SECONDS = 0.1
READERS = 4
STEPS, STEP_BUDGET_SECONDS = 2000, 0.005


class SqliteDatabase(Database):
    """An SQLite database at `path` on a local disk. `synchronous` is `full` or `normal`."""

    kind = "sqlite"
    is_file = True

    def __init__(self, path: str, *, synchronous: str = "full") -> None:
        pragmas = {
            "journal_mode": "wal",
            "synchronous": synchronous,
            "busy_timeout": BUSY_TIMEOUT_MS,
            "foreign_keys": 1,
            "cache_size": -4000,  # for each of six connections; the operating system caches the rest
            "temp_store": "memory",
            "wal_autocheckpoint": 4000,
        }
        engine = peewee.SqliteDatabase(
            path,
            pragmas=pragmas,
            autoconnect=False,
            returning_clause=True,
            check_same_thread=False,
            cached_statements=512,
        )
        super().__init__(engine)
        self.synchronous, self._inline = synchronous, threading.local()
        self.last_batch, self._arrived = 0, list[QueuedUnit]()
        self._arrived_on: asyncio.AbstractEventLoop | None = None
        self.pools = [
            DatabasePool("writer", 1, _WriterThread, self),
            DatabasePool("reader", READERS, _ReaderThread, self),
        ]

    def _submit(self, queued: QueuedUnit) -> None:
        # Small batches gain nothing by waiting, and while units are queued, the writer is busy anyway.
        at_once = self.last_batch <= SMALL_BATCH or not self.pools[0].queue.empty()
        if at_once or queued.read or isinstance(queued.future, concurrent.futures.Future):
            super()._submit(queued)
        else:
            loop = queued.future.get_loop()
            if self._arrived_on is not loop:
                loop.call_soon(self._queue_submitted, loop, 0)  # first, so that no unit stays behind
                self._arrived_on = loop
            self._arrived.append(queued)

    def _queue_submitted(self, loop: asyncio.AbstractEventLoop, seen: int) -> None:
        """Queue the units of work that the event loop has submitted, if there are as many as in the last batch.

        If there are fewer, wait until an iteration of the event loop in which no unit arrives, or until the first
        iteration after 10 ms. `seen` is the number of units before this iteration. A large batch is cheaper, because
        its units share one COMMIT. It also runs faster than units that are queued one by one, because the event loop
        and the writer compete for the interpreter as long as both are running.
        """
        arrived = self._arrived
        if seen < len(arrived) < self.last_batch and time.monotonic() - arrived[0].queued_at < BATCH_SECONDS:
            loop.call_soon(self._queue_submitted, loop, len(arrived))
        else:
            self._arrived, self._arrived_on = [], None
            for queued in arrived:
                try:
                    super()._submit(queued)
                except Unavailable as error:
                    queued.error = error
                    queued.resolve()

    def connect(self, *, query_only: bool) -> sqlite3.Connection:
        """Return the connection of this thread. The connection is opened on first use."""
        if self.engine.is_closed():
            self.engine.connect()
            self.engine.connection().execute("PRAGMA query_only=1" if query_only else "PRAGMA busy_timeout=0")
        connection: sqlite3.Connection = self.engine.connection()
        return connection

    def read_now(self, fn: Callable[[], T], entry: UnitContext) -> T:
        refuse_nesting()
        connection = getattr(self._inline, "connection", None)
        if connection is None:
            connection = self._inline.connection = self.connect(query_only=True)
            connection.set_progress_handler(lambda: time.perf_counter() > self._inline.deadline, STEPS)
        self._inline.deadline = time.perf_counter() + STEP_BUDGET_SECONDS
        try:
            connection.execute("BEGIN")  # may be interrupted too, if the process was suspended
            value: T = run_in_unit(Unit(self, connection, entry, read_only=True), fn)
        except (peewee.OperationalError, sqlite3.OperationalError) as error:
            if "interrupted" in str(error):
                raise InlineReadTimeout from None
            raise translate_error(error) from error
        finally:
            self._inline.deadline = math.inf  # the rollback of a slow read must not be interrupted too
            connection.rollback()
        return value

    def ping(self) -> None:
        with contextlib.closing(sqlite3.connect(f"file:{self.engine.database}?mode=rw", uri=True, timeout=1)) as opened:
            opened.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()

    def close_loop_connection(self) -> None:
        super().close_loop_connection()
        self._inline.connection = None


class _SqliteThread(DatabaseThread):
    database: SqliteDatabase
    query_only = True

    def __init__(self, pool: DatabasePool) -> None:
        super().__init__(pool)
        self._ending = threading.Lock()  # two threads may execute on one connection, but neither may close it then

    def ensure_connection(self) -> Any:
        if self.connection is None:
            self.connection = self.database.connect(query_only=self.query_only)
        return self.connection

    def close(self) -> None:
        with self._ending:
            if self.lost and self.connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
            self.connection = None
            self.database.engine.close()

    def release_cursors(self, error: BaseException) -> BaseException:
        """Release the cursors of an abandoned unit of work, and return the error that the unit raised.

        The traceback keeps the cursors alive, and open cursors would keep the database locked.
        """
        if self.lost:
            traceback.clear_frames(error.__traceback__)
        return error

    def sever_connection(self) -> None:
        """Roll back and refuse further writes.

        The thread may be executing SQLite code at this moment, so the thread itself closes the connection later. If
        another thread closed the connection, the database could stay locked, or the process could crash.
        """
        with self._ending:
            if self.connection is None:
                return
            cut = threading.Timer(CUT_SECONDS, self.connection.interrupt)  # interrupts a statement that does not finish
            cut.daemon = True
            cut.start()
            for statement in ("PRAGMA query_only=1", "ROLLBACK"):
                with contextlib.suppress(sqlite3.Error):  # SQLite ended the transaction itself
                    self.connection.execute(statement)
            cut.cancel()


class _ReaderThread(_SqliteThread):
    def run_units(self, queued: QueuedUnit) -> list[QueuedUnit]:
        if queued.future.cancelled():
            return []
        self.record_unit_start(queued)
        try:
            self.ensure_connection().execute("BEGIN")
            queued.unit = Unit(self.database, self.connection, queued.entry, read_only=True)
            queued.value = self.run_unit(queued.unit, queued)
        except BaseException as error:
            queued.error = translate_error(self.release_cursors(error))
        self.record_unit_end()
        if self.connection is not None and self.connection.in_transaction:
            self.connection.execute("ROLLBACK")
        return [queued]


class _WriterThread(_SqliteThread):
    query_only = False
    _is_durable = True  # whether the connection waits for the disk at COMMIT

    def run_units(self, queued: QueuedUnit) -> list[QueuedUnit]:
        self.batch, self.is_sharing = [], not queued.tries
        try:
            self._begin(queued.entry)
        except (peewee.DatabaseError, sqlite3.Error) as error:
            queued.error = translate_error(error)
            return [queued]
        began = time.perf_counter()
        following: QueuedUnit | None = queued
        while following is not None:
            # A transaction cannot become durable, and a unit that runs again needs a savepoint.
            if (following.entry.durable and not self._is_durable) or (following.tries and self.is_sharing):
                self.database.deliver(self._commit())
                return self.run_units(following)
            if not self._run_in_batch(following):
                return []
            following = self._next_of_batch(began)
        self.database.last_batch = len(self.batch)
        return self._commit()

    def _begin(self, entry: UnitContext) -> None:
        """Begin a write transaction, retrying at short intervals while another process is writing.

        SQLite's own retries would wait for up to 100 ms, and would miss the short gaps between the transactions of a
        process that writes continuously.
        """
        until, connection = time.monotonic() + BUSY_TIMEOUT_MS / 1000, self.ensure_connection()
        if entry.durable is not self._is_durable:
            connection.execute(f"PRAGMA synchronous={self.database.synchronous if entry.durable else 'normal'}")
            self._is_durable = entry.durable
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(BUSY_POLL_SECONDS)

    def _next_of_batch(self, began: float) -> QueuedUnit | None:
        """Return the next unit of work of the batch, or None if the batch is complete."""
        if len(self.batch) >= BATCH_UNITS or time.perf_counter() - began >= BATCH_SECONDS or self.pool.queue.empty():
            return None
        queued = self.pool.queue.get()  # which no other thread does, so it does not block
        if queued is None:  # the pool is closing: the thread must see this after the batch
            self.pool.queue.put(None)
        return None if queued is not None and self.pool.refuse_quarantined(queued) else queued

    def _run_in_batch(self, queued: QueuedUnit) -> bool:
        """Run one unit of work. Return False if its failure ended the transaction of the whole batch."""
        if queued.future.cancelled():
            return True
        changes = self.connection.total_changes
        self._execute(queued)
        if queued.error is None or self._undo(changes):
            self.batch.append(queued)
            return True
        if self.is_sharing and self.batch:  # one of the others may be the cause
            self._run_again([*self.batch, queued])
        else:
            self._run_again(self.batch)
            self.database.deliver([queued])
        return False

    def _execute(self, queued: QueuedUnit) -> None:
        """Run one unit of work and store its value or its error.

        The unit of work runs in a savepoint if it belongs to a batch that is being run again after a failure.
        """
        queued.tries += 1
        queued.unit, queued.error = Unit(self.database, self.connection, queued.entry, read_only=False), None
        self.record_unit_start(queued)
        try:
            if not self.is_sharing:
                self.connection.execute("SAVEPOINT unit")
            queued.value = self.run_unit(queued.unit, queued)
            if not self.is_sharing:
                self.connection.execute("RELEASE unit")
        except BaseException as error:
            queued.value, queued.error = None, translate_error(self.release_cursors(error))  # the value may be a cursor
        self.record_unit_end()

    def _undo(self, changes: int) -> bool:
        """Undo the changes of the failed unit of work alone, and return whether this was possible.

        `changes` is the number of rows that the connection had changed before the unit.
        """
        if self.is_sharing:
            unchanged = self.connection.in_transaction and self.connection.total_changes == changes
            return unchanged and not self._has_open_statement()
        try:
            self.connection.execute("ROLLBACK TO unit")
            self.connection.execute("RELEASE unit")
        except sqlite3.Error:  # SQLite ended the transaction, or a statement of the unit is still open
            return False
        return True

    def _commit(self) -> list[QueuedUnit]:
        if self.is_sharing:
            ended = [each.unit for each in self.batch if each.unit is not None and each.error is None]
            pairs = [pair for unit in ended for pair in unit.collected]
            shared = QueuedUnit(lambda: write_collected(pairs), SHARED_WRITES, concurrent.futures.Future(), read=False)
            self._execute(shared)
            if shared.error is not None or self._has_open_statement():
                logging.getLogger("corral.database").warning("shared writes failed, retrying", exc_info=shared.error)
                self._run_again(self.batch)
                return []
        with self.lock:
            if self.lost:
                raise ThreadAbandoned
        batch, self.batch = self.batch, []
        try:
            self.connection.execute("COMMIT")
        except (peewee.DatabaseError, sqlite3.Error) as error:
            self.connection.rollback()
            for each in batch:
                each.error = translate_error(error)
        return batch

    def _run_again(self, units: list[QueuedUnit]) -> None:
        """Roll back the transaction, and queue these units of work again."""
        self.connection.rollback()
        if self._has_open_statement():
            self.close()
        for queued in units:
            self.pool.queue.put(queued)

    def _has_open_statement(self) -> bool:
        """Return whether a statement that writes is still open. It would prevent COMMIT and savepoints."""
        try:
            self.connection.execute("SAVEPOINT unit")
            self.connection.execute("RELEASE unit")
        except sqlite3.Error:
            return True
        return False
