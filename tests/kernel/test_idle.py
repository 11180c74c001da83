"""An installation in which nothing happens hardly works: its disk and its processor are left alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral.database import sqlite
from corral.testing.kit import Kit

SECONDS = 10


@contextlib.contextmanager
def counted_commits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Collect, for each COMMIT of the writer that changes rows, whether it waits for the disk."""
    found: list[bool] = []
    changes: dict[Any, int] = {}
    commit = sqlite._WriterThread._commit

    def count(self: Any) -> Any:
        total = self.connection.total_changes
        if total != changes.get(self, 0):
            found.append(self._is_durable)
        changes[self] = total
        return commit(self)

    with monkeypatch.context() as patched:
        patched.setattr(sqlite._WriterThread, "_commit", count)
        yield found


@pytest.mark.one_engine
async def test_an_idle_installation_hardly_commits(
    make_kit: Callable[..., Awaitable[Kit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_commits(monkeypatch) as commits:
        kit = await make_kit(plugins=None, jobs=True)
        if kit.kernel.database.kind != "sqlite":
            pytest.skip("a database server decides itself when it writes")
        runner = kit.kernel.runner
        async with asyncio.timeout(120):  # until what runs once at the start has ended
            while len(runner._next_checks) < len(runner.schedules) or runner._running:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        commits.clear()
        await asyncio.sleep(SECONDS)
        assert len(commits) <= 4 * SECONDS
        assert sum(commits) <= SECONDS  # the others do not wait for the disk
