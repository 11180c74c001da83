"""Reaches what the configuration names, within seconds and leaves nothing behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from corral import clock
from corral.config.model import Config
from corral.errors import Refused

if TYPE_CHECKING:
    from corral.cli.checks import Finding
    from corral.crypto import Keyring
    from corral.database.engine import Database

SECONDS = 3.0


def database(config: Config) -> Iterator[Finding]:
    """Whether it answers, and what of the schema is pending."""
    from corral.cli.checks import Finding

    path = _sqlite_path(config)
    if is_absent(config):
        yield Finding("database", "warning", f"{path} does not exist", "corral serve or corral migrate makes it")
        return
    try:
        with _connected(config) as found:
            found.ping()
            yield Finding("database", "ok", f"{found.kind} answers")
            yield from _migrations(config, found)
    except Refused as refused:
        yield from (Finding("database", "down", fault) for fault in refused.faults)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "start it, or correct [database] url" if path is None else f"if {path} is damaged, restore a backup"
        yield Finding("database", "down", f"does not answer: {reason}", remedy)


def _migrations(config: Config, found: Database) -> Iterator[Finding]:
    from corral.cli.checks import Finding
    from corral.database.migrations import Newer, is_empty, pending
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import migrates_on_start

    homes = [home for item in load(discover(config), config) if item.active and (home := item.home()) is not None]
    try:
        waiting = pending(found, homes)
    except Newer as error:
        yield Finding("migrations", "down", str(error), "install the release that made this database")
        return
    if not waiting:
        yield Finding("migrations", "ok", "none pending")
        return
    names = "; ".join(f"{plugin}: {', '.join(scripts)}" for plugin, scripts in waiting.items())
    if is_empty(found):
        yield Finding("migrations", "warning", "the database is empty", "the next start fills it, or corral migrate")
    elif migrates_on_start(config, found.kind):
        yield Finding("migrations", "warning", f"pending: {names}", "the next start applies them, or corral migrate")
    else:
        yield Finding("migrations", "down", f"pending: {names}", "back the database up, then corral migrate")


def is_sealed(config: Config, keyring: Keyring) -> bool:
    """Whether there are encrypted rows, none of which these keys open."""
    from corral.plugins.discovery import discover
    from corral.plugins.loading import load
    from corral.plugins.migrations import sealed_columns

    if is_absent(config):
        return False
    known = {key.id for key in keyring.keys}
    try:
        columns = sealed_columns(load(discover(config), config))
        with _connected(config) as found:
            stored = found.run(lambda: columns.key_ids(known), read=True)
    except Exception:  # that the database or its schema cannot be used is told elsewhere
        return False
    return bool(stored) and stored.isdisjoint(known)


def database_skew(config: Config) -> float | None:
    """Seconds by which the database's clock is ahead of ours. On SQLite: the newest event, if it is in the future."""
    from corral.database.migrations import own_connection

    if is_absent(config):
        return None
    engine: Any
    try:
        with _connected(config) as found, own_connection(found) as engine:
            if found.kind == "postgresql":
                began = time.time()
                theirs = float(engine.execute_sql("SELECT extract(epoch FROM clock_timestamp())").fetchone()[0])
                return theirs - (began + time.time()) / 2
            newest = engine.execute_sql("SELECT max(ts) FROM kernel_events").fetchone()[0]
            return max(0.0, clock.parse_instant(newest) - clock.time_s()) if newest else None
    except Exception:  # no database, no skew: that it does not answer is told elsewhere
        return None


def ping_redis(url: str) -> str | None:
    """None when it answers as the server asks it, by the same library; else why not."""
    from redis import Redis

    try:
        with Redis.from_url(url, socket_timeout=SECONDS, socket_connect_timeout=SECONDS) as client:
            client.ping()
    except Exception as error:  # an unknown option in the URL is a TypeError
        return f"cannot be used: {error}"
    return None


def has_bus(config: Config) -> bool:
    """Whether a plugin serves the Redis URL; without one the server does not start."""
    from corral.plugins.discovery import discover
    from corral.plugins.hooks import first_result
    from corral.plugins.loading import load

    try:
        first_result(load(discover(config), config), "corral_bus", config.redis.url or "")
    except Refused:
        return False
    return True


def ping_store(config: Config) -> str | None:
    """None when a plugin serves the storage URL and the store answers; else why not."""
    import asyncio

    from corral.plugins.discovery import discover
    from corral.plugins.loading import load

    url = config.storage.url or ""
    for loaded in load(discover(config), config):
        serve = getattr(loaded.plugin, "corral_blob_store", None) if loaded.active else None
        store = serve(url=url) if serve is not None else None
        if store is not None:
            return asyncio.run(_look_into(store))
    return f"no active plugin serves {urlsplit(url).scheme}:// storage"


async def _look_into(store: Any) -> str | None:
    import asyncio

    try:
        async with asyncio.timeout(SECONDS):
            await store.probe()
    except Exception as error:
        return f"does not answer: {type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[Database]:
    from corral.database.connect import connect

    found = connect(config.database.url, pool_size=1)
    try:
        yield found
    finally:
        found.close()


def is_absent(config: Config) -> bool:
    """Whether the database is a file that is not there. Raises `PermissionError` where nobody here may look."""
    path = _sqlite_path(config)
    return path is not None and not path.exists()


def _sqlite_path(config: Config) -> Path | None:
    url = config.database.url
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
