"""Copies all stored files to another store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import msgspec

from corral.errors import Unavailable
from corral.storage.blobs import Blob, BlobMissing, BlobStore
from corral_plugins.files.models import File


class TransferReport(msgspec.Struct):
    """The result of a transfer.

    It contains the number and total size of the copied files, the number of files that already existed, and the keys of
    damaged files.
    """

    copied: int = 0
    bytes: int = 0
    present: int = 0
    failed: list[str] = []


class StoreTransfer:
    """Copies blobs one at a time.

    The target store contains a blob either completely or not at all, so an interrupted transfer can resume. The
    arguments `service` and `run` of the constructor are the methods of the command's session with these names.
    """

    def __init__(self, service: Callable[[Any], Any], run: Callable[..., Any]) -> None:
        self._source: BlobStore = service(BlobStore)
        self._run = run

    async def run(self, target: BlobStore) -> TransferReport:
        """Copy every blob that is missing from the target store or differs there.

        Each blob is checked against the stored hash of its file.
        """
        report = TransferReport()
        there = {blob.key: blob.size async for blob in target.scan()}
        async for blob in self._source.scan():
            if blob.key.startswith("."):
                continue
            if there.get(blob.key) == blob.size and await self._is_same(blob.key, target):
                report.present += 1
            elif await self._copy(blob.key, target):
                report.copied += 1
                report.bytes += blob.size
            else:
                report.failed.append(blob.key)
        return report

    async def _copy(self, key: str, target: BlobStore) -> bool:
        """Copy a blob. Return False if the blob is damaged, in which case the target store does not keep it."""
        try:
            chunks = await self._source.read(key)
        except BlobMissing:  # deleted since the scan
            return True
        except Unavailable:
            return False
        copied = await target.put(key, chunks)
        expected = self._expected(key)
        if expected in (None, copied):
            return True
        await target.delete(key)
        return False

    async def _is_same(self, key: str, target: BlobStore) -> bool:
        """Return whether the target store contains the correct bytes of a blob.

        If the blob belongs to a file, its size and hash are compared with those of the file. Otherwise, the bytes are
        compared with those in the source store.
        """
        try:
            return await _size_and_hash(target, key) == (self._expected(key) or await _size_and_hash(self._source, key))
        except (BlobMissing, Unavailable):
            return False

    def _expected(self, key: str) -> Blob | None:
        """Return the size and hash of the file that is stored under a key, or None if the key belongs to no file."""
        row = self._run(lambda: File.get_or_none(File.key == key), read=True)
        return None if row is None else Blob(row.size_bytes, row.sha256)


async def _size_and_hash(store: BlobStore, key: str) -> Blob:
    digest, size = hashlib.sha256(), 0
    async for chunk in await store.read(key):
        await asyncio.to_thread(digest.update, chunk)
        size += len(chunk)
    return Blob(size, digest.hexdigest())
