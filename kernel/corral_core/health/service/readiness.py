"""Readiness checks of this process for `/health/ready`.

They have a timeout, and their results are cached for a second.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from corral.database.engine import Database
from corral.database.migrations import pending_migrations
from corral.plugins.migrations import migrations_of
from corral.plugins.registry import PluginRegistry

KEEP_SECONDS = 1.0
PING_SECONDS = 1.0


class ReadinessChecks(msgspec.Struct, kw_only=True):
    """Results of the readiness checks. They are only booleans, because anyone can read the response."""

    database: bool
    migrations: bool
    plugins: bool
    accepting: bool


class ReadinessProbe:
    """Checks the readiness of this process. `accepting` is False once the shutdown has begun."""

    def __init__(self, database: Database, registry: PluginRegistry) -> None:
        self._database, self._registry = database, registry
        self._asked: tuple[float, asyncio.Task[bool]] | None = None
        self.pending_migrations: int | None = None
        """The number of migration scripts that are not yet applied, or None before the first check."""
        self.served = False  # whether the database answered at the last check
        self.accepting = True

    async def begin_shutdown(self) -> None:
        """Report the process as not ready from now on, because it is shutting down."""
        self.accepting = False

    async def run_checks(self) -> ReadinessChecks:
        """Run the readiness checks. This takes at most a second."""
        built_in = [item for item in self._registry.all() if item.found.built_in]
        return ReadinessChecks(
            database=await self.database_serves(),
            migrations=self.pending_migrations == 0,
            plugins=all(item.state != "failed" for item in built_in),
            accepting=self.accepting,
        )

    async def database_serves(self) -> bool:
        """Return whether the database answers a trivial query within a second. Concurrent callers share one query."""
        asked = self._asked
        if asked is None or (asked[1].done() and time.monotonic() - asked[0] > KEEP_SECONDS):
            asked = self._asked = (time.monotonic(), asyncio.ensure_future(asyncio.to_thread(self._run_database_check)))
        done, _ = await asyncio.wait({asked[1]}, timeout=PING_SECONDS)
        self.served = bool(done) and asked[1].result()
        return self.served

    def _run_database_check(self) -> bool:
        try:
            self._database.ping()
            if self.pending_migrations != 0:  # migration scripts do not change while a process runs
                pending = pending_migrations(self._database, migrations_of(self._registry.all()))
                self.pending_migrations = sum(map(len, pending.values()))
        except Exception:
            return False
        return True
