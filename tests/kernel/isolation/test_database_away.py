"""A database that is away, stands still or makes wait for a lock is no fault of the plugins that need it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.kernel.database.stalls import standing_still
from tests.kernel.isolation.misbehaving import payloads, plugin, until

from corral.database.engine import Database
from corral.database.unit import current
from corral.events import log as event_log
from corral.events.consumers import Subscriber
from corral.testing.database_servers import PostgresServer
from corral.testing.kit import Kit, make_kernel

pytestmark = pytest.mark.postgres
MARK = "INSERT INTO kernel_leases(name, holder, until) VALUES ('mark', 'x', '') ON CONFLICT DO NOTHING"


@pytest.fixture(scope="module")
def started() -> Iterator[PostgresServer]:
    with PostgresServer() as made:
        yield made


@pytest.fixture
def server(started: PostgresServer) -> PostgresServer:
    """Running, whatever the test before has done to it. Each test has a database of its own."""
    return started.start()


def unharmed(kit: Kit, name: str) -> bool:
    return kit.loaded(name).active and kit.kernel.registry.error_counts(name) == (0, 0)


async def test_background_tasks_wait_for_it_and_go_on_at_once(
    tmp_path: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.background_tasks.INITIAL_DELAY", 0.01)  # as after many restarts
    looks: list[float] = []

    async def start(self: Any, runtime: Any) -> None:
        async def look() -> None:
            while True:
                await runtime.service(Database).work(event_log.last_seq, read=True)
                looks.append(time.monotonic())
                await asyncio.sleep(0.05)

        runtime.supervise("look", look)

    patient = plugin("patient", start=start)
    async with make_kernel(tmp_path, plugins=[patient], database_url=server.create_database(), jobs=True) as kit:
        await until(lambda: bool(looks))
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(4)
        await asyncio.to_thread(server.start)
        back = time.monotonic()
        await until(lambda: looks[-1] > back)
        await kit.as_user("viewer")
        async with asyncio.timeout(60):
            assert "user.created" in [each.type for each in await kit.events()]  # they are numbered again
        assert unharmed(kit, "patient")
        assert unharmed(kit, "accounts")
        assert await payloads(kit, "system.alert") == []


async def test_a_subscriber_that_waits_for_a_lock_is_not_held(tmp_path: Path, server: PostgresServer) -> None:
    seen: list[str] = []

    def follow(event: Any) -> None:
        current().connection.execute(MARK)
        seen.append(event.id)

    url = server.create_database()
    listener = plugin("listener", corral_subscribers=lambda self: [Subscriber("listener.f", ("user.created",), follow)])
    async with make_kernel(tmp_path, plugins=[listener], database_url=url, jobs=True) as kit:
        await asyncio.sleep(0.5)
        with psycopg.connect(url) as other:
            other.execute(MARK)
            await kit.as_user("viewer")
            await asyncio.sleep(7)
            other.rollback()
        await until(lambda: bool(seen))
        assert unharmed(kit, "listener")


async def test_a_subscriber_is_not_held_while_the_server_stands_still(tmp_path: Path, server: PostgresServer) -> None:
    begun: list[str] = []
    seen: list[str] = []

    def wait(event: Any) -> None:
        begun.append(event.id)
        current().connection.execute("SELECT pg_sleep(0.5)")
        seen.append(event.id)

    names = [f"listener.{letter}" for letter in "abc"]
    subscribers = [Subscriber(name, ("user.created",), wait) for name in names]
    listener = plugin("listener", corral_subscribers=lambda self: subscribers)
    async with make_kernel(tmp_path, plugins=[listener], database_url=server.create_database(), jobs=True) as kit:
        await asyncio.sleep(0.5)
        await kit.as_user("viewer")
        await until(lambda: bool(begun))
        with standing_still(server):
            await asyncio.sleep(5)
        await until(lambda: len(seen) >= 3)
        assert unharmed(kit, "listener")
        assert unharmed(kit, "accounts")
