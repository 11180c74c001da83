"""What two units of work do to the same rows at the same time. Only PostgreSQL runs units at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.plugins.files.conftest import PLUGINS, Shelf
from tests.rival import Rival

from corral.testing.kit import make_kernel
from corral_plugins.files.api import Files, FileSource
from corral_plugins.files.models import Upload, Usage
from corral_plugins.files.service.quota import FileQuota

pytestmark = [pytest.mark.postgres, pytest.mark.asyncio(loop_scope="module")]


class RivalShelf(Shelf):
    """A shelf, and a transaction of another process."""

    rival: Rival

    async def quota(self, act: Any) -> Any:
        """What a method of the quota does, in a unit of work."""
        return await self.kit.work(lambda: act(self.kit.service(FileQuota)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shelf(tmp_path_factory: pytest.TempPathFactory, postgres_server: Any) -> AsyncIterator[RivalShelf]:
    url = postgres_server.unused_database_url()
    folder: Path = tmp_path_factory.mktemp("races")
    async with make_kernel(folder, database_url=url, plugins=[*PLUGINS]) as kit:
        made = await RivalShelf().build(kit)
        made.rival = Rival(url)
        yield made
        made.rival.close()
    postgres_server.drop_database(url)


async def test_an_upload_that_ends_while_it_grows_gives_all_bytes_back(shelf: RivalShelf) -> None:
    upload, owner = "01890a5d-ac96-774b-bcce-b302099a8057", shelf.owner.user["id"]
    await shelf.quota(lambda quota: quota.begin(upload, owner, 10))
    more = "reserved = reserved + 100"
    shelf.rival.transaction.execute(f"UPDATE files_uploads SET {more} WHERE id = %s", (upload,))
    shelf.rival.transaction.execute(f"UPDATE files_usage SET {more} WHERE owner_id = %s", (owner,))
    end = asyncio.ensure_future(shelf.quota(lambda quota: quota.end(upload)))
    await shelf.rival.until_blocked(1, end)
    shelf.rival.transaction.commit()
    assert await end
    left = await shelf.kit.work(lambda: (Upload.select().count(), Usage.get(Usage.owner_id == owner).reserved))
    assert left == (0, 0)


async def test_an_upload_that_grows_locks_nothing_before_its_own_row(shelf: RivalShelf) -> None:
    upload, owner = "01890a5d-ac96-774b-bcce-b302099a8058", shelf.owner.user["id"]
    await shelf.quota(lambda quota: quota.begin(upload, owner, 10))
    shelf.rival.transaction.execute("SELECT 1 FROM files_uploads WHERE id = %s FOR UPDATE", (upload,))
    growth = asyncio.ensure_future(shelf.quota(lambda quota: quota.grow(upload, owner, 5)))
    await shelf.rival.until_blocked(1, growth)
    try:  # what the end of the upload locks next; a wait for each other would be a deadlock
        shelf.rival.transaction.execute("SELECT 1 FROM files_usage WHERE owner_id = %s FOR UPDATE NOWAIT", (owner,))
    finally:
        shelf.rival.transaction.rollback()
        await growth
    assert await shelf.quota(lambda quota: quota.end(upload))


async def test_a_task_that_is_deleted_during_an_upload_leaves_no_reference(shelf: RivalShelf) -> None:
    task, owner = await shelf.task(), shelf.owner.user["id"]
    assert (await shelf.owner.post(f"/tasks/{task}/cancel", {})).status == 200
    await shelf.upload(b"so that the owner has a row")

    async def nothing() -> AsyncIterator[bytes]:
        shelf.rival.transaction.execute("SELECT 1 FROM files_usage WHERE owner_id = %s FOR UPDATE", (owner,))
        return
        yield b""

    files, source = shelf.kit.service(Files), FileSource(type="user", id=owner)
    put = files.put(nothing(), name="late.txt", owner_id=owner, source=source, task_id=task)
    upload = asyncio.ensure_future(put)
    await shelf.rival.until_blocked(1, upload)  # it has seen the task, and not committed yet
    deletion = asyncio.ensure_future(shelf.owner.delete(f"/tasks/{task}"))
    await shelf.rival.until_blocked(2, deletion)
    if deletion.done():
        await shelf.kit.run_consumers()
        await shelf.kit.run_jobs()
    shelf.rival.transaction.rollback()
    file = await upload
    assert (await deletion).status == 204
    await shelf.kit.run_consumers()
    await shelf.kit.run_jobs()
    assert (await shelf.owner.get(f"/files/{file.id}")).json()["task_id"] is None
