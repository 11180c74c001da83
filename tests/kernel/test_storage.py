"""`local_storage`: whole or absent, never on the loop, never outside its folder."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from corral.errors import TooLarge, Unavailable
from corral.storage.blobs import Blob, BlobMissing, BlobStore
from corral_core.local_storage import service as blobs
from corral_core.local_storage.service import CHUNK, LocalBlobs

KEY = "2026/11/24/01900000-0000-7000-8000-000000000001"


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(store: BlobStore, key: str = KEY, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in await store.read(key, start, stop)])


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "files")


async def test_put_then_open(store: LocalBlobs) -> None:
    protocol: BlobStore = store
    data = os.urandom(3 * CHUNK + 17)
    blob = await protocol.put(KEY, stream(data[:5], b"", data[5 : 2 * CHUNK], data[2 * CHUNK :]))
    assert blob == Blob(len(data), hashlib.sha256(data).hexdigest())
    assert await read(protocol) == data
    assert files(store.folder) == [KEY]
    assert stat.S_IMODE((store.folder / KEY).stat().st_mode) == 0o600
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


async def test_an_empty_blob_is_a_blob(store: LocalBlobs) -> None:
    assert await store.put(KEY, stream()) == Blob(0, hashlib.sha256().hexdigest())
    assert await read(store) == b""


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (5, 10), (5, None), (9, 99), (10, None), (99, None), (7, 3), (0, 0)]
)
async def test_ranges(store: LocalBlobs, start: int, stop: int | None) -> None:
    await store.put(KEY, stream(b"0123456789"))
    assert await read(store, start=start, stop=stop) == b"0123456789"[start:stop]


async def test_absent_blobs(store: LocalBlobs) -> None:
    with pytest.raises(BlobMissing):
        await store.read(KEY)
    await store.delete(KEY)
    assert [found async for found in store.scan()] == []
    assert await store.sweep(86_400) == 0


async def test_delete(store: LocalBlobs) -> None:
    await store.put(KEY, stream(b"x"))
    reading = await store.read(KEY)
    await store.delete(KEY)
    assert files(store.folder) == []
    assert b"".join([chunk async for chunk in reading]) == b"x"  # who reads already, reads on


@pytest.mark.parametrize(
    "key",
    [
        "",
        "..",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "a/",
        ".incoming/x",
        "a/.b",
        "A",
        "a\0b",
        "a\\b",
        "a\n",
        "x" * 101,
    ],
)
async def test_keys_cannot_leave_the_folder(store: LocalBlobs, key: str) -> None:
    with pytest.raises(ValueError, match="storage key"):
        await store.put(key, stream(b"x"))
    with pytest.raises(ValueError, match="storage key"):
        await store.read(key)
    with pytest.raises(ValueError, match="storage key"):
        await store.delete(key)
    assert not store.folder.exists()


async def test_over_the_limit_nothing_is_kept(store: LocalBlobs) -> None:
    assert (await store.put(KEY, stream(b"12345", b"67890"), limit=10)).size == 10
    with pytest.raises(TooLarge):
        await store.put("other", stream(b"12345", b"678901"), limit=10)
    assert files(store.folder) == [KEY]


async def test_unit_of_work_13_an_upload_that_breaks_leaves_nothing_and_the_old_bytes_stay(store: LocalBlobs) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 * CHUNK)
        raise ConnectionResetError

    await store.put(KEY, stream(b"old"))
    with pytest.raises(ConnectionResetError):
        await store.put(KEY, broken())
    assert files(store.folder) == [KEY]
    assert await read(store) == b"old"


async def test_a_cancelled_upload_leaves_nothing(store: LocalBlobs) -> None:
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(CHUNK)
            started.set()

    for delay in (0, 0.001, 0.005, 0.02):
        started.clear()
        task = asyncio.create_task(store.put(KEY, endless()))
        await started.wait()
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert files(store.folder) == []


async def test_an_unfinished_read_closes_its_file(store: LocalBlobs) -> None:
    await store.put(KEY, stream(bytes(3 * CHUNK)))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        reading = await store.read(KEY)
        await anext(reading)
        await reading.aclose()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_no_file_call_on_the_loop(store: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    for module, name in (
        (os, "fsync"),
        (os, "open"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "open"),
        (Path, "stat"),
    ):
        real = getattr(module, name)

        def spy(*args: Any, _real: Any = real, **named: Any) -> Any:
            seen.add(threading.get_ident())
            return _real(*args, **named)

        monkeypatch.setattr(module, name, spy)
    await store.put(KEY, stream(b"x"))
    await read(store)
    assert [found.key async for found in store.scan()] == [KEY]
    await store.delete(KEY)
    await store.probe()
    await store.sweep(86_400)
    assert seen
    assert threading.get_ident() not in seen


async def test_bytes_are_synced_before_the_name_appears(store: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def spy_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    await store.probe()
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    await store.put("2026/a", stream(b"x"))
    assert calls == ["file", "rename", "folder", "folder"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "storage_full"), (errno.EDQUOT, "storage_full"), (errno.EIO, "dependency_unavailable")],
)
async def test_a_failing_disk_is_503_and_nothing_stays(
    store: LocalBlobs, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def fail(handle: int) -> None:
        raise OSError(number, "no")

    await store.put(KEY, stream(b"x"))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Unavailable) as caught:
        await store.put("b", stream(b"x"))
    assert (caught.value.code, caught.value.status) == (code, 503)
    assert files(store.folder) == [KEY]
    assert await read(store) == b"x"


async def test_a_real_full_disk(store: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_create", lambda part: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(Unavailable) as caught:
        await store.put(KEY, stream(bytes(CHUNK)))
    assert caught.value.code == "storage_full"
    assert KEY not in files(store.folder)


async def test_probe(store: LocalBlobs, tmp_path: Path) -> None:
    await store.probe()
    assert files(store.folder) == []
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable):
        await LocalBlobs(tmp_path / "file").probe()


async def test_scan_sees_whole_blobs_only(store: LocalBlobs) -> None:
    for number in range(3):
        await store.put(f"2026/{number}", stream(b"x" * number))
    (store.folder / ".incoming" / "part").write_bytes(b"x")
    found = sorted([found async for found in store.scan()])
    assert [(item.key, item.size) for item in found] == [("2026/0", 0), ("2026/1", 1), ("2026/2", 2)]
    assert all(abs(item.modified - time.time()) < 60 for item in found)


async def test_scan_goes_through_all_batches(store: LocalBlobs) -> None:
    await store.put("d/0", stream())
    for number in range(1, 1203):
        (store.folder / "d" / str(number)).touch()
    assert len({found.key async for found in store.scan()}) == 1203


async def test_unit_of_work_13_a_sweep_takes_old_leftovers_only(store: LocalBlobs) -> None:
    await store.put(KEY, stream(b"x"))
    old, new = store.folder / ".incoming" / "old", store.folder / ".incoming" / "new"
    old.touch()
    new.touch()
    os.utime(old, (1, 1))
    os.utime(store.folder / KEY, (1, 1))
    assert await store.sweep(3600) == 1
    assert files(store.folder) == [".incoming/new", KEY]


KILLED = """
import asyncio, sys
from pathlib import Path
from corral_core.local_storage.service import LocalBlobs
async def chunks():
    for _ in range(20):
        yield b"x" * 100_000
async def main():
    store = LocalBlobs(Path(sys.argv[1]))
    for number in range(10_000):
        await store.put(f"d{number % 7}/{number}", chunks())
        print(number, flush=True)
asyncio.run(main())
"""


async def test_kill_leaves_each_blob_whole_or_absent(store: LocalBlobs) -> None:
    acknowledged: set[str] = set()
    environ = {**os.environ, "PYTHONPATH": str(Path(blobs.__file__).parents[2])}
    for wanted in (1, 4, 9):
        process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on this loop
            [sys.executable, "-c", KILLED, str(store.folder)], stdout=subprocess.PIPE, text=True, env=environ
        )
        assert process.stdout
        for _ in range(wanted):
            number = int(process.stdout.readline())
            acknowledged.add(f"d{number % 7}/{number}")
        await asyncio.sleep(0.003 * wanted)
        process.kill()
        process.wait()
        process.stdout.close()
    sizes = {found.key: found.size async for found in store.scan()}
    assert acknowledged <= set(sizes)
    assert set(sizes.values()) == {2_000_000}
    await store.sweep(0)
    assert not [name for name in files(store.folder) if name.startswith(".")]
