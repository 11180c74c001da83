"""A plugin whose tables are missing or whose units are slow takes its own share of the database, and no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.kernel.isolation.misbehaving import plugin, routes, until

from corral.auth.principal import PUBLIC
from corral.database.unit import current
from corral.events.consumers import Subscriber
from corral.plugins.guard import is_expected_error
from corral.testing.kit import Kit

MakeKit = Callable[..., Awaitable[Kit]]
SLOW_SECONDS = 1.2


async def test_slow_reads_of_one_plugin_leave_lanes_for_the_others(make_kit: MakeKit) -> None:
    group = routes("slow")

    @group.get("/reads", needs=PUBLIC)
    def read_slowly() -> None:
        """Take long."""
        time.sleep(SLOW_SECONDS)

    kit = await make_kit(plugins=[plugin("slow", corral_routes=lambda self: [group])], config={"database.pool_size": 4})
    slow = [asyncio.ensure_future(kit.client.get("/slow/reads")) for _ in range(8)]
    await asyncio.sleep(0.2)
    took = []
    for _ in range(5):
        began = time.monotonic()
        await kit.kernel.database.work(lambda: current().connection.execute("SELECT 1").fetchone(), read=True)
        took.append(time.monotonic() - began)
    assert sorted(took)[2] < SLOW_SECONDS / 2, took
    assert [answer.status for answer in await asyncio.gather(*slow)] == [200] * 8


async def test_a_missing_table_is_the_plugins_own_error(make_kit: MakeKit) -> None:
    def follow(event: Any) -> None:
        current().connection.execute("SELECT * FROM faulty_things")

    subscriber = Subscriber("faulty.follow", ("user.created",), follow)
    kit = await make_kit(plugins=[plugin("faulty", corral_subscribers=lambda self: [subscriber])], jobs=True)
    viewer = await kit.as_user("viewer")
    await until(lambda: kit.loaded("faulty").state == "quarantined", 30)
    assert "faulty_things" in (kit.loaded("faulty").reason or "")
    assert (await viewer.get("/auth/me")).status == 200


async def test_a_database_that_is_away_is_nobodys_error(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[])
    with pytest.raises(Exception) as missing:  # noqa: PT011  (the engine's own)
        await kit.kernel.database.work(lambda: current().connection.execute("SELECT * FROM nothing"), read=True)
    assert not is_expected_error(missing.value)
    if kit.kernel.database.kind == "sqlite":
        import sqlite3

        assert is_expected_error(sqlite3.OperationalError("database is locked"))
    else:
        import psycopg

        assert is_expected_error(psycopg.OperationalError("the connection is lost"))
