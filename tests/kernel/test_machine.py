"""One machine at a time on an SQLite database, whatever the number of its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corral import clock
from corral.database.leases import acquire_lease, lease_holder, release_lease
from corral.errors import StartupError
from corral.testing.kit import Kit, make_kernel
from corral_core.health.service.single_machine_lock import LEASE, SingleMachineLock


async def test_a_second_machine_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, plugins=[]) as kit:
        work = kit.kernel.database.work
        with pytest.raises(StartupError, match=r"a server on the machine .+ already uses this database file"):
            await SingleMachineLock(work, "elsewhere 0000-1111").acquire()
        clock.travel(31)
        await SingleMachineLock(work, "elsewhere 0000-1111").acquire()
        with pytest.raises(StartupError, match="health: StartupError: a server on the machine elsewhere already uses"):
            async with make_kernel(tmp_path, plugins=[]):
                pass


@pytest.mark.parametrize(
    "again",
    ["first 1111", "first 2222", "second 1111"],
    ids=["the same process", "started again", "another container"],
)
async def test_the_same_machine_is_not(tmp_path: Path, again: str) -> None:
    async with make_kernel(tmp_path, plugins=[]) as kit:
        work = kit.kernel.database.work
        await work(lambda: release_lease(LEASE, lease_holder(LEASE) or ""))
        await work(lambda: acquire_lease(LEASE, "first 1111", 30))
        await SingleMachineLock(work, again).acquire()
        assert await work(lambda: lease_holder(LEASE), read=True) == again


async def test_many_machines_share_a_postgresql(kit: Kit, make_kit: Any, database_url: str) -> None:
    holder = await kit.kernel.database.work(lambda: lease_holder(LEASE), read=True)
    assert (holder is None) == database_url.startswith("postgresql")
    await make_kit()
