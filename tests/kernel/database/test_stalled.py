"""A database that stands still for some seconds serves again as soon as it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from tests.kernel.database.stalls import standing_still

from corral.database.connect import connect
from corral.database.engine import Database
from corral.database.unit import UnitContext, current
from corral.errors import Unavailable
from corral.testing.database_servers import PostgresServer

pytestmark = pytest.mark.postgres
LABELS = ("GET /things", "authentication")


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as started:
        yield started


async def ask(database: Database, label: str) -> int:
    def unit() -> int:
        return int(current().connection.execute("SELECT 1").fetchone()[0])

    return await database.work(unit, entry=UnitContext(label, request_id="r-1"), read=True)


async def test_its_units_are_no_fault_of_their_routes(server: PostgresServer) -> None:
    database = connect(server.create_database(), pool_size=6)

    def pause() -> None:
        current().connection.execute("SELECT pg_sleep(0.2)")

    try:
        await asyncio.gather(*[database.work(pause, read=True) for _ in range(6)])  # each thread has its connection
        failed = 0
        with standing_still(server):
            for _ in range(2):
                asked = await asyncio.gather(*[ask(database, label) for label in LABELS], return_exceptions=True)
                failed += sum(isinstance(each, Unavailable) and each.code == "dependency_unavailable" for each in asked)
            await asyncio.sleep(2.5)  # the looks whether it answers others end too
        assert failed == 4
        async with asyncio.timeout(60):
            assert await asyncio.gather(*[ask(database, label) for label in LABELS]) == [1, 1]
    finally:
        await asyncio.to_thread(database.close)
