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
            import psycopg  # noqa: F401  (the driver is an extra: say so before anything starts)

            from corral.database.postgres import PostgresDatabase
        except ImportError:
            raise Refused("database.url: PostgreSQL needs its driver: pip install 'corral[postgres]'") from None
        return PostgresDatabase(url, pool_size=pool_size)
    raise Refused("database.url: use sqlite:///path or postgresql://user@host/name")
