"""Copies all stored files to another store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from corral.errors import Unavailable
from corral.storage.blobs import BlobMissing, BlobStore
from corral_plugins.files.models import File


class MoveReport(msgspec.Struct):
    """What a move did: copied files and their bytes, files that were there before, and keys of damaged files."""

    copied: int = 0
    bytes: int = 0
    present: int = 0
    failed: list[str] = []


class FileMove:
    """Copies blobs one by one. A blob is complete or absent in the other store, so an interrupted move goes on.

    `service` and `run` are those of a command's session.
    """

    def __init__(self, service: Callable[[Any], Any], run: Callable[..., Any]) -> None:
        self._source: BlobStore = service(BlobStore)
        self._run = run

    async def run(self, target: BlobStore) -> MoveReport:
        """Copy every blob that the other store lacks, and compare each with the hash of its file."""
        report = MoveReport()
        there = {blob.key: blob.size async for blob in target.scan()}
        async for blob in self._source.scan():
            if blob.key.startswith("."):
                continue
            if there.get(blob.key) == blob.size:
                report.present += 1
            elif await self._copy(blob.key, target):
                report.copied += 1
                report.bytes += blob.size
            else:
                report.failed.append(blob.key)
        return report

    async def _copy(self, key: str, target: BlobStore) -> bool:
        """Copy a blob. Return False if it is damaged; then it is not kept in the other store."""
        try:
            chunks = await self._source.read(key)
        except BlobMissing:  # deleted since the scan
            return True
        except Unavailable:
            return False
        copied = await target.put(key, chunks)
        expected = self._run(lambda: File.get_or_none(File.key == key), read=True)
        if expected is None or (expected.size_bytes, expected.sha256) == copied:
            return True
        await target.delete(key)
        return False
