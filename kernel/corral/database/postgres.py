"""PostgreSQL: a pool of threads, each with its own connection, and one transaction per unit of work.

After a serialisation failure, a deadlock or a connection lost before COMMIT, a unit is retried, up to 3 attempts in
total. If the connection is lost during COMMIT, the unit is not retried, because it may have taken effect.
"""

from __future__ import annotations

import contextlib
import socket

import peewee
import psycopg
from psycopg.conninfo import conninfo_to_dict

from corral.database.engine import Database, translate_error
from corral.database.pool import LOST_AFTER, MAX_TRIES, DatabasePool, DatabaseThread, QueuedUnit
from corral.database.unit import Unit
from corral.errors import Unavailable

RETRYABLE = frozenset({"40001", "40P01"})
READ_ONLY, QUERY_CANCELED = "25006", "57014"
ENGINE_ERRORS = (peewee.DatabaseError, peewee.InterfaceError, psycopg.Error)


class PostgresDatabase(Database):
    """A PostgreSQL database. `url` is a libpq URL, and `pool_size` is the number of connections."""

    kind = "postgresql"
    is_file = False

    def __init__(self, url: str, *, pool_size: int = 16) -> None:
        options = f"-c statement_timeout={int(LOST_AFTER * 1000)} -c idle_in_transaction_session_timeout=10000"
        if given := conninfo_to_dict(url).get("options"):  # our argument would otherwise replace the options of the URL
            options = f"{given} {options}"
        engine = peewee.PostgresqlDatabase(
            url, prefer_psycopg3=True, autoconnect=False, connect_timeout=2, options=options, application_name="corral"
        )
        super().__init__(engine)
        self._url = url
        self.pools = [DatabasePool("database", pool_size, _PostgresThread, self)]

    def ping(self) -> None:
        with psycopg.connect(self._url, connect_timeout=1) as connection:
            connection.execute("SELECT 1")


def _sqlstate(error: BaseException | None) -> str | None:
    while error is not None:
        state = getattr(error, "sqlstate", None) or getattr(getattr(error, "orig", None), "sqlstate", None)
        if state:
            return str(state)
        error = error.__cause__ or error.__context__
    return None


class _PostgresThread(DatabaseThread):
    def run_units(self, queued: QueuedUnit) -> list[QueuedUnit]:
        if queued.future.cancelled():
            return []
        while not self._attempt(queued):
            continue
        return [queued]

    def _attempt(self, queued: QueuedUnit) -> bool:
        """Run one transaction. Return False if the transaction must run again."""
        queued.tries += 1
        queued.unit = queued.error = None
        self.record_unit_start(queued)
        try:
            self._begin_transaction(read=queued.read)
            queued.unit = Unit(self.database, self.connection, queued.entry, read_only=queued.read)
            queued.value = self.run_unit(queued.unit, queued)
        except BaseException as error:
            queued.error = error
        self.record_unit_end()
        if queued.error is not None:
            return self._handle_failure(queued, queued.error)
        try:
            done = self.connection.execute("COMMIT").statusmessage
        except Exception as error:
            if _sqlstate(error) in RETRYABLE and queued.tries < MAX_TRIES:
                return self._handle_failure(queued, error)
            self._drop_connection()
            queued.error = Unavailable("The database connection was lost during the commit.", retry_after=2)
        else:
            if done == "ROLLBACK" and not queued.read:
                queued.error = RuntimeError(
                    "the unit of work caught the error of a failed statement; let it propagate, or use a savepoint"
                )
        return True

    def _begin_transaction(self, *, read: bool) -> None:
        statement = "BEGIN READ ONLY" if read else "BEGIN"
        if self.connection is not None:
            try:
                self.connection.execute(statement)
                return
            except Exception:  # a pooled connection may be stale: retry once on a new one
                self._drop_connection()
        self.database.engine.connect(reuse_if_open=True)
        self.connection = self.database.engine.connection()
        self.connection.execute(statement)

    def _handle_failure(self, queued: QueuedUnit, error: BaseException) -> bool:
        """Roll back after a failure. Return False if the transaction must run again."""
        state = _sqlstate(error)
        refused = state == READ_ONLY and not queued.read  # a new connection may reach the primary
        if refused:
            self._drop_connection()
        lost = not self._roll_back() and queued.unit is not None and isinstance(error, ENGINE_ERRORS)
        again = lost or state in RETRYABLE
        if again and queued.tries < MAX_TRIES:
            return False
        if refused:
            queued.error = Unavailable("The database is read-only at the moment; try again later.", retry_after=2)
        elif again or state == QUERY_CANCELED:
            queued.error = Unavailable("The database could not complete this operation; try again.", code="overloaded")
        else:
            queued.error = translate_error(error)
        return True

    def _roll_back(self) -> bool:
        """Roll back the transaction, and return whether the rollback succeeded. If it failed, close the connection."""
        try:
            self.connection.execute("ROLLBACK")
        except Exception:
            self._drop_connection()
            return False
        return True

    def _drop_connection(self) -> None:
        self.connection = None
        try:
            self.database.engine.close()
        except Exception:
            self.database.engine.dispose()

    def close(self) -> None:
        self._drop_connection()

    def sever_connection(self) -> None:
        """Shut down only the socket. Freeing a connection while its thread is using it would crash the process."""
        with contextlib.suppress(Exception), socket.fromfd(self.connection.fileno(), -1, socket.SOCK_STREAM) as line:
            line.shutdown(socket.SHUT_RDWR)
