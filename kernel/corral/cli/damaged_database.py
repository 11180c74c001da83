"""Recognises errors that a damaged SQLite file causes.

The remedy for a damaged database differs from that for a database that is unreachable or busy.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from corral.config.model import Config
from corral.errors import StartupError

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
REMEDY = "move it away with its -wal and -shm files, then run `corral restore FILE` with your last backup"


@contextlib.contextmanager
def explain_damage(config: Config) -> Iterator[None]:
    """If a damaged database file causes an error in the `with` block, raise a `StartupError` that states the remedy."""
    try:
        yield
    except Exception as error:
        path, reason = sqlite_path(config), find_damage(error)
        if path is None or reason is None:
            raise
        raise StartupError(f"{path} is damaged ({reason}); {REMEDY}") from error


def find_damage(error: BaseException | None) -> str | None:
    """Return SQLite's description of the damage if the error, or one of its causes, reports a damaged file."""
    while error is not None:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED:  # the other bits tell what was read
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def sqlite_path(config: Config) -> Path | None:
    """Return the path of the SQLite file, or None if the database is on a server."""
    url = config.database.url
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
