"""What sweeps delete and report, what a purged account leaves behind, and how files move to another store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.engines import POSTGRES
from tests.plugins.files.conftest import S3Server, Shelf

from corral.database import pool
from corral.storage.blobs import BlobStore
from corral_core.accounts.api import Accounts
from corral_core.local_storage.service import LocalBlobs
from corral_plugins.files.commands import files_command_group, format_bytes
from corral_plugins.files.service import sweeps
from corral_plugins.files.service.s3 import S3Blobs
from corral_plugins.files.service.sweeps import FileSweeps


async def one(content: bytes) -> AsyncIterator[bytes]:
    yield content


def store_of(shelf: Shelf) -> Any:
    """The store of the shelf."""
    store: Any = shelf.kit.kernel.container.get(BlobStore)
    return store


async def alerts(shelf: Shelf) -> list[str]:
    """The files about which admins were alerted."""
    events = [event for event in await shelf.kit.events() if event.type == "system.alert"]
    return [event.payload()["file_id"] for event in events]


async def test_the_sweep_deletes_bytes_without_a_row_and_reports_rows_without_bytes(any_shelf: Shelf) -> None:
    shelf, store = any_shelf, store_of(any_shelf)
    kept, lost = await shelf.upload(b"kept"), await shelf.upload(b"lost")
    before = set(await shelf.blobs())
    await store.put("files/2026/01/01/orphan", one(b"of an upload that was killed"))
    await store.put("shelf/cover", one(b"of another plugin"))
    await shelf.kit.run_schedule("files.sweep")
    assert len(await shelf.blobs()) == 4  # the orphan is young
    await shelf.kit.service(FileSweeps).sweep(-1)
    assert set(await shelf.blobs()) == {*before, "shelf/cover"}
    assert await alerts(shelf) == []

    path = f"/files/{lost['id']}/download"
    keys = {(await _content(store, key)): key for key in before}
    await store.delete(keys[b"lost"])
    await shelf.kit.run_schedule("files.sweep")
    assert await alerts(shelf) == [lost["id"]]
    assert (await shelf.owner.get(path)).status == 503
    assert (await shelf.owner.get(f"/files/{kept['id']}/download")).body == b"kept"


@pytest.mark.one_engine
async def test_many_files_without_bytes_are_one_alert(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "MAX_ALERTS", 2)
    for number in range(5):
        await shelf.upload(b"%d" % number)
    for key in await shelf.blobs():
        await store_of(shelf).delete(key)
    await shelf.kit.run_schedule("files.sweep")
    found = [event.payload() for event in await shelf.kit.events() if event.type == "system.alert"]
    assert [each["kind"] for each in found] == ["file_missing", "file_missing", "files_missing"]
    assert "the bytes of 5 files" in found[-1]["detail"]


async def _content(store: Any, key: str) -> bytes:
    return b"".join([chunk async for chunk in await store.read(key)])


async def test_files_are_verified(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "VERIFIED_SHARE", 1)
    file, store = await shelf.upload(b"as it was"), store_of(shelf)
    await shelf.kit.run_schedule("files.verify")
    assert await alerts(shelf) == []
    (key,) = await shelf.blobs()
    await store.delete(key)
    await store.put(key, one(b"as it is."))
    await shelf.kit.run_schedule("files.verify")
    assert await alerts(shelf) == [file["id"]]


async def test_only_the_sample_is_read(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    await shelf.upload(b"one")
    await shelf.upload(b"two")
    service, asked = shelf.kit.service(FileSweeps), list[str]()
    find = service._registry.find_any

    def note_and_find(file_id: str) -> Any:
        asked.append(file_id)
        return find(file_id)

    monkeypatch.setattr(service._registry, "find_any", note_and_find)
    monkeypatch.setattr(sweeps, "_is_in_sample", lambda sha256: False)
    await shelf.kit.run_schedule("files.verify")
    assert asked == []
    monkeypatch.setattr(sweeps, "_is_in_sample", lambda sha256: True)
    await shelf.kit.run_schedule("files.verify")
    assert len(asked) == 2


@pytest.mark.one_engine
async def test_a_bucket_is_swept_below_its_prefix_only(s3_server: S3Server) -> None:
    store, client = S3Blobs(s3_server.bucket()), s3_server.client()
    for key in ("kept/left", "kept-by-others/running"):
        client.create_multipart_upload(Bucket=store.bucket, Key=key)
    assert await store.sweep(3600) == 0  # both are young, and may be running
    assert await store.sweep(-3600) == 1
    found = client.list_multipart_uploads(Bucket=store.bucket)["Uploads"]
    assert [each["Key"] for each in found] == ["kept-by-others/running"]


async def test_a_purged_account_leaves_what_it_shared(shelf: Shelf) -> None:
    task = await shelf.task()
    await shelf.upload(b"private")
    shared = await shelf.upload(b"shared", query=f"?task_id={task}", fields={"visibility": "task"})
    accounts: Any = shelf.kit.kernel.container.get(Accounts)
    assert (await shelf.admin.patch(f"/admin/users/{shelf.owner.user['id']}", {"is_active": False})).status == 200
    await shelf.kit.work(lambda: accounts.purge(shelf.owner.user["id"]))
    await shelf.kit.run_consumers()
    await shelf.kit.run_jobs()
    assert len(await shelf.blobs()) == 1
    assert (await shelf.other.get(f"/files/{shared['id']}/download")).body == b"shared"


async def test_files_move_to_another_store(shelf: Shelf, tmp_path: Path) -> None:
    contents = [b"one", b"two" * 500_000]
    for content in contents:
        await shelf.upload(content)
    to = f"file://{tmp_path}/elsewhere"
    moved = await shelf.kit.run_command(files_command_group, "move", "--to", to)
    assert (moved.exit_code, moved.stdout.startswith("Copied 2 files")) == (0, True), moved.output
    target, keys = LocalBlobs(tmp_path / "elsewhere"), await shelf.blobs()
    assert sorted([await _content(target, key) for key in keys]) == sorted(contents)
    await target.delete(keys[0])  # as if the move had been interrupted
    again = await shelf.kit.run_command(files_command_group, "move", "--to", to, "--json")
    assert '"copied": 1' in again.stdout
    assert '"present": 1' in again.stdout
    right = await _content(target, keys[0])
    await target.put(keys[0], one(bytes(len(right))))  # another file of the same size
    repaired = await shelf.kit.run_command(files_command_group, "move", "--to", to, "--json")
    assert '"copied": 1' in repaired.stdout
    assert await _content(target, keys[0]) == right
    await store_of(shelf).delete(keys[0])
    await store_of(shelf).put(keys[0], one(b"damaged"))
    await target.delete(keys[0])
    refused = await shelf.kit.run_command(files_command_group, "move", "--to", to)
    assert (refused.exit_code, keys[0] in refused.output) == (1, True)
    assert [blob.key async for blob in target.scan()] == [keys[1]]


@pytest.mark.one_engine
async def test_files_move_to_a_bucket(shelf: Shelf, s3_server: S3Server) -> None:
    await shelf.upload(b"moved")
    url = s3_server.bucket()
    moved = await shelf.kit.run_command(files_command_group, "move", "--to", url)
    assert moved.exit_code == 0, moved.output
    assert [await _content(S3Blobs(url), key) for key in await shelf.blobs()] == [b"moved"]


def test_sizes_are_written_for_people() -> None:
    shown = [format_bytes(size) for size in (0, 1023, 1024, 1536 * 1024, 250 * 1024**2, 10 * 1024**3)]
    assert shown == ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 MiB", "250 MiB", "10.0 GiB"]


@POSTGRES
@pytest.mark.parametrize("change", ["expires_at = NULL", "visibility = 'task', task_id = id"])
async def test_a_file_that_its_owner_keeps_at_the_same_time_is_not_swept(
    shelf: Shelf, database_url: str, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(pool, "LOST_AFTER", 60.0)  # the sweep waits for the lock as long as the test needs
    file, sweeps_of = await shelf.upload(), shelf.kit.service(FileSweeps)
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with (
        await psycopg.AsyncConnection.connect(database_url) as owner,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as watcher,
    ):
        is_expiry = change.startswith("expires_at")
        if is_expiry:
            await watcher.execute("UPDATE files_files SET expires_at = '2020-01-01T00:00:00.000Z'")
        await owner.execute(f"UPDATE files_files SET {change}")
        sweep = sweeps_of.sweep(0) if is_expiry else sweeps_of.delete_private_files(file["owner_id"])
        sweeping = asyncio.ensure_future(sweep)
        async with asyncio.timeout(60):
            while (await (await watcher.execute(blocked)).fetchone()) == (0,):  # noqa: ASYNC110  (no notification exists)
                await asyncio.sleep(0.01)
        await owner.commit()
        await sweeping
    assert (await shelf.owner.get(f"/files/{file['id']}")).status == 200
