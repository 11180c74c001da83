"""A transaction of another process on the same PostgreSQL database, which a test lets come first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import psycopg

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


class Rival:
    """`transaction` has changed or locked rows, and commits or rolls back when the test says so."""

    def __init__(self, url: str) -> None:
        self.transaction, self._watcher = psycopg.connect(url), psycopg.connect(url, autocommit=True)

    def close(self) -> None:
        """Roll back, and close the connections."""
        self.transaction.close()
        self._watcher.close()

    async def until_blocked(self, count: int, running: asyncio.Future[Any]) -> None:
        """Wait until so many units of work wait for a lock, or the operation is over."""
        ends = time.monotonic() + 60
        while self._watcher.execute(WAITING).fetchone()[0] < count and not running.done():  # type: ignore[index]  # a count is one row
            assert time.monotonic() < ends
            await asyncio.sleep(0.005)

    async def before(self, operation: Awaitable[Any], statement: str = "", *parameters: Any) -> Any:
        """Begin an operation after the statement, commit when it waits for it, and return its result."""
        if statement:
            self.transaction.execute(statement, parameters)
        running = asyncio.ensure_future(operation)
        await self.until_blocked(1, running)
        self.transaction.commit()
        return await running
