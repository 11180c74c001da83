"""What two units of work do to the same rows at the same time. Only PostgreSQL runs units at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from tests.plugins.files.conftest import PLUGINS, Shelf

from corral.testing.kit import make_kernel
from corral_plugins.files.api import Files, FileSource
from corral_plugins.files.models import Upload, Usage
from corral_plugins.files.service.quota import FileQuota

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


class Rival(Shelf):
    """A shelf, and a transaction of another process that has locked rows of it."""

    other_process: psycopg.Connection
    watcher: psycopg.Connection

    def connect(self, url: str) -> None:
        self.other_process, self.watcher = psycopg.connect(url), psycopg.connect(url, autocommit=True)

    def disconnect(self) -> None:
        self.other_process.close()
        self.watcher.close()

    async def until_blocked(self, count: int, running: asyncio.Future[Any]) -> None:
        """Wait until so many units of work wait for a lock, or the operation is over."""
        ends = time.monotonic() + 60
        while self.watcher.execute(WAITING).fetchone()[0] < count and not running.done():  # type: ignore[index]  # a count is one row
            assert time.monotonic() < ends
            await asyncio.sleep(0.005)

    async def quota(self, act: Any) -> Any:
        """What a method of the quota does, in a unit of work."""
        return await self.kit.work(lambda: act(self.kit.service(FileQuota)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rival(tmp_path_factory: pytest.TempPathFactory, postgres_server: Any) -> AsyncIterator[Rival]:
    url = postgres_server.unused_database_url()
    folder: Path = tmp_path_factory.mktemp("races")
    async with make_kernel(folder, database_url=url, plugins=[*PLUGINS]) as kit:
        made = await Rival().build(kit)
        made.connect(url)
        yield made
        made.disconnect()
    postgres_server.drop_database(url)


async def test_an_upload_that_ends_while_it_grows_gives_all_bytes_back(rival: Rival) -> None:
    upload, owner = "01890a5d-ac96-774b-bcce-b302099a8057", rival.owner.user["id"]
    await rival.quota(lambda quota: quota.begin(upload, owner, 10))
    more = "reserved = reserved + 100"
    rival.other_process.execute(f"UPDATE files_uploads SET {more} WHERE id = %s", (upload,))
    rival.other_process.execute(f"UPDATE files_usage SET {more} WHERE owner_id = %s", (owner,))
    end = asyncio.ensure_future(rival.quota(lambda quota: quota.end(upload)))
    await rival.until_blocked(1, end)
    rival.other_process.commit()
    assert await end
    left = await rival.kit.work(lambda: (Upload.select().count(), Usage.get(Usage.owner_id == owner).reserved))
    assert left == (0, 0)


async def test_an_upload_that_grows_locks_nothing_before_its_own_row(rival: Rival) -> None:
    upload, owner = "01890a5d-ac96-774b-bcce-b302099a8058", rival.owner.user["id"]
    await rival.quota(lambda quota: quota.begin(upload, owner, 10))
    rival.other_process.execute("SELECT 1 FROM files_uploads WHERE id = %s FOR UPDATE", (upload,))
    growth = asyncio.ensure_future(rival.quota(lambda quota: quota.grow(upload, owner, 5)))
    await rival.until_blocked(1, growth)
    try:  # what the end of the upload locks next; a wait for each other would be a deadlock
        rival.other_process.execute("SELECT 1 FROM files_usage WHERE owner_id = %s FOR UPDATE NOWAIT", (owner,))
    finally:
        rival.other_process.rollback()
        await growth
    assert await rival.quota(lambda quota: quota.end(upload))


async def test_a_task_that_is_deleted_during_an_upload_leaves_no_reference(rival: Rival) -> None:
    task, owner = await rival.task(), rival.owner.user["id"]
    assert (await rival.owner.post(f"/tasks/{task}/cancel", {})).status == 200
    await rival.upload(b"so that the owner has a row")

    async def nothing() -> AsyncIterator[bytes]:
        rival.other_process.execute("SELECT 1 FROM files_usage WHERE owner_id = %s FOR UPDATE", (owner,))
        return
        yield b""

    files, source = rival.kit.service(Files), FileSource(type="user", id=owner)
    put = files.put(nothing(), name="late.txt", owner_id=owner, source=source, task_id=task)
    upload = asyncio.ensure_future(put)
    await rival.until_blocked(1, upload)  # it has seen the task, and not committed yet
    deletion = asyncio.ensure_future(rival.owner.delete(f"/tasks/{task}"))
    await rival.until_blocked(2, deletion)
    if deletion.done():
        await rival.kit.run_consumers()
        await rival.kit.run_jobs()
    rival.other_process.rollback()
    file = await upload
    assert (await deletion).status == 204
    await rival.kit.run_consumers()
    await rival.kit.run_jobs()
    assert (await rival.owner.get(f"/files/{file.id}")).json()["task_id"] is None
