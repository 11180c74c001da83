"""`connect(url)`: which engine serves is known here and nowhere else."""

from __future__ import annotations

from corral.database.engine import Database
from corral.errors import Refused


def connect(url: str, *, synchronous: str = "full", pool_size: int = 16) -> Database:
    """Open `sqlite:///path` or `postgresql://…`. Nothing is read yet; `Refused` for any other URL."""
    if url.startswith("sqlite:///"):
        from corral.database.sqlite import SqliteDatabase

        return SqliteDatabase(url.removeprefix("sqlite:///"), synchronous=synchronous)
    if url.startswith(("postgresql://", "postgres://")):
        try:
            import psycopg

            from corral.database.postgres import PostgresDatabase
        except ImportError:  # the driver is an extra: say so before anything starts
            raise Refused("database.url: PostgreSQL needs its driver: pip install 'corral[postgres]'") from None
        try:
            return PostgresDatabase(url, pool_size=pool_size)
        except psycopg.ProgrammingError as error:  # it goes on with what is wrong, which may be a password
            raise Refused(f"database.url: {str(error).partition(':')[0]}; in such a URL % is written %25") from None
    raise Refused("database.url: use sqlite:///path or postgresql://user@host/name")
