"""The blob store that uses a folder on this machine."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import suppress
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from corral.errors import TooLarge, Unavailable
from corral.storage.blobs import Blob, BlobInfo, BlobMissing

CHUNK = 1 << 20
_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}(/[a-z0-9][a-z0-9._-]{0,99}){0,7}")
T = TypeVar("T")


class LocalBlobs:
    """Stores blobs as files with mode 0600 in one folder. No file operation runs on the event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._incoming = folder / ".incoming"  # cannot collide with a blob, because no key begins with a dot

    async def put(self, key: str, stream: AsyncIterable[bytes], *, limit: int | None = None) -> Blob:
        """Store the stream durably. See `BlobStore.put`."""
        path, part = self._path(key), self._incoming / secrets.token_hex(16)
        digest, size, waiting = hashlib.sha256(), 0, bytearray()
        file = await _in_thread(self._create, part)

        def flush() -> None:
            digest.update(waiting)
            file.write(waiting)
            waiting.clear()

        try:
            async for chunk in stream:
                size += len(chunk)
                if limit is not None and size > limit:
                    raise TooLarge(f"The file is larger than {limit} bytes.")
                waiting += chunk
                if len(waiting) >= CHUNK:
                    await _in_thread(flush)
            await _in_thread(flush)
            await _in_thread(self._publish, file, part, path)
        except BaseException:  # including a cancelled upload
            await _in_thread(_discard, file, part)
            raise
        return Blob(size, digest.hexdigest())

    async def read(self, key: str, start: int = 0, stop: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a blob in chunks. See `BlobStore.read`."""
        path = self._path(key)
        try:
            file = await _in_thread(lambda: path.open("rb", buffering=0))
        except FileNotFoundError:
            raise BlobMissing(key) from None
        return _read(file, start, stop)

    async def delete(self, key: str) -> None:
        """Delete the blob if it exists. See `BlobStore.delete`."""
        await _in_thread(self._path(key).unlink, True)  # a missing file is not an error

    async def scan(self) -> AsyncGenerator[BlobInfo, None]:
        """Iterate over all blobs. See `BlobStore.scan`."""
        walk = self._walk()
        while batch := await _in_thread(lambda: list(islice(walk, 500))):
            for found in batch:
                yield found

    async def probe(self) -> None:
        """Write and delete a test file. See `BlobStore.probe`."""
        part = self._incoming / secrets.token_hex(16)
        file = await _in_thread(self._create, part)
        await _in_thread(_discard, file, part)

    async def sweep(self, older_than_seconds: float) -> int:
        """Delete old files that interrupted uploads left behind. See `BlobStore.sweep`."""
        return await _in_thread(
            self._sweep, time.time() - older_than_seconds
        )  # file times do not follow `clock.travel`

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a valid storage key")
        return self.folder / key

    def _create(self, part: Path) -> BinaryIO:
        if not self.folder.exists():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync(self.folder.parent)
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        return os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def _publish(self, file: BinaryIO, part: Path, path: Path) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)
        for folder in (path.parent, *path.parent.parents):  # the directory entries of new folders must be durable too
            _sync(folder)
            if folder == self.folder:
                break

    def _walk(self) -> Iterator[BlobInfo]:
        for place, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(place, name) for name in names):
                with suppress(FileNotFoundError):  # deleted in the meantime
                    facts = path.stat()
                    yield BlobInfo(path.relative_to(self.folder).as_posix(), facts.st_size, facts.st_mtime)

    def _sweep(self, before: float) -> int:
        swept = 0
        for part in self._incoming.glob("*"):
            with suppress(FileNotFoundError):
                if part.stat().st_mtime < before:
                    part.unlink()
                    swept += 1
        return swept


async def _read(file: FileIO, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
    try:
        at = file.seek(start)
        while (wanted := CHUNK if stop is None else min(CHUNK, stop - at)) > 0:
            if not (chunk := await _in_thread(file.read, wanted)):
                return
            at += len(chunk)
            yield chunk
    finally:
        file.close()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(file: BinaryIO, part: Path) -> None:
    with suppress(OSError):
        file.close()
    with suppress(OSError):
        part.unlink(missing_ok=True)


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    """Run the function in a thread. Raise `Unavailable` for any `OSError` other than `FileNotFoundError`.

    If the caller is cancelled, wait until the function ends, because the function uses an open file.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        with suppress(Exception):
            work.result()
        raise
    except FileNotFoundError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = "storage_full" if full else "dependency_unavailable"
        raise Unavailable("The file storage is not available; try again later.", code=code) from error
