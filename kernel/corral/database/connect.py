"""Opens a database. `connect(url)` selects the engine that the URL specifies."""

from __future__ import annotations

from corral.database.engine import Database
from corral.errors import StartupError

FILE_SCHEME, SERVER_SCHEMES = "sqlite:///", ("postgresql://", "postgres://")


def connect(url: str, *, synchronous: str = "full", pool_size: int = 16) -> Database:
    """Open the database at a `sqlite:///path` or `postgresql://…` URL. No data is read yet.

    Raise `StartupError` for any other URL.
    """
    if url.startswith(FILE_SCHEME):
        from corral.database.sqlite import SqliteDatabase

        return SqliteDatabase(url.removeprefix(FILE_SCHEME), synchronous=synchronous)
    if url.startswith(SERVER_SCHEMES):
        try:
            import psycopg

            from corral.database.postgres import PostgresDatabase
        except ImportError:  # the driver is an optional extra, so report its absence before anything starts
            raise StartupError(
                "database.url: the driver is not installed; run pip install 'corral[postgres]'"
            ) from None
        try:
            return PostgresDatabase(url, pool_size=pool_size)
        except psycopg.ProgrammingError as error:  # the rest of the message quotes the URL and may contain a password
            reason = str(error).partition(":")[0]
            raise StartupError(f"database.url: {reason}; write % in the URL as %25") from None
    raise StartupError("database.url: use sqlite:///path or postgresql://user@host/name")
