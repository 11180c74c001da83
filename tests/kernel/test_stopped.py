"""A kernel that has stopped leaves nothing behind in its process."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import uuid
import weakref
from pathlib import Path

import psutil
import pytest

from corral.errors import Unavailable
from corral.kernel import Kernel
from corral.testing.kit import make_kernel


async def used(folder: Path, database_url: str) -> weakref.ref[Kernel]:
    """What a kernel that served somebody was, once it has stopped."""
    async with make_kernel(folder, database_url=database_url, jobs=True) as kit:
        person = await kit.as_user("admin", f"{uuid.uuid4()}@example.org")
        assert (await person.get("/agents")).status == 200
        return weakref.ref(kit.kernel)


def test_neither_memory_nor_threads_nor_files(tmp_path: Path, database_url: str) -> None:
    asyncio.run(used(tmp_path, database_url))  # what a process has once is made here
    threads, files = threading.active_count(), psutil.Process().num_fds()
    kernel = asyncio.run(used(tmp_path, database_url))
    until = time.monotonic() + 30  # threads end by themselves; how soon depends on the load of the machine
    while (kernel() is not None or threading.active_count() > threads) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    assert kernel() is None
    assert threading.active_count() <= threads, threading.enumerate()
    assert psutil.Process().num_fds() <= files
    assert list(tmp_path.rglob("*.db-*")) == []  # the last connection that is closed takes the log along


async def test_a_process_with_jobs_stops_although_its_database_is_closed_already(
    tmp_path: Path, database_url: str
) -> None:
    async with make_kernel(tmp_path, database_url=database_url, jobs=True) as kit:
        database = kit.kernel.database
        await asyncio.to_thread(database.close)
        with pytest.raises(Unavailable, match="The database is closed"):
            await database.work(lambda: None)
        async with asyncio.timeout(120):
            await kit.kernel.stop()
