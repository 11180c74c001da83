"""Sweeps that delete expired files, the remains of interrupted uploads, and the private files of purged users.

They also detach files from deleted tasks, and verify samples of the stored files.
"""

from __future__ import annotations

import logging
import time

from corral import clock
from corral.database.engine import Work
from corral.errors import Problem
from corral_plugins.files.models import File
from corral_plugins.files.service.downloads import Downloads
from corral_plugins.files.service.quota import FileQuota
from corral_plugins.files.service.registry import FileRegistry
from corral_plugins.files.service.storage import PREFIX, FileStorage

log = logging.getLogger("corral.files")

BATCH = 200
ORPHAN_SECONDS = 86_400.0
MAX_ALERTS = 20  # about single files with missing bytes, in one sweep
VERIFIED_SHARE = 100  # one file of so many is verified by each run


class FileSweeps:
    """Deletes data that is no longer needed. If a sweep is interrupted, the next sweep continues its work."""

    def __init__(
        self, storage: FileStorage, registry: FileRegistry, quota: FileQuota, downloads: Downloads, work: Work
    ) -> None:
        self._storage, self._registry, self._quota, self._downloads = storage, registry, quota, downloads
        self._work = work

    async def sweep(self, older_than_seconds: float = ORPHAN_SECONDS) -> None:
        """Delete expired files, the remains of interrupted uploads, and old stored bytes that belong to no file."""
        while await self._work(lambda: self._quota.end_abandoned(BATCH)) == BATCH:
            pass
        await self._delete_expired()
        await self._storage.blob_store.sweep(older_than_seconds)
        started = clock.now()
        await self._report_missing(await self._delete_orphans(older_than_seconds), started)

    async def delete_private_files(self, owner_id: str) -> None:
        """Delete the private files of a purged user. Files that are shared with a task are kept."""
        while rows := await self._work(lambda: self._remove(self._registry.private_files(owner_id, BATCH))):
            await self._discard(rows)

    async def leave_task(self, task_id: str) -> None:
        """Detach files from a deleted task. They become private files of their owners."""
        while await self._work(lambda: self._registry.leave_task(task_id, BATCH)) == BATCH:
            pass

    async def verify(self) -> None:
        """Compare the files in the sample of the current week with their stored hashes.

        Raise an alert for each damaged or missing file.
        """
        after = ""
        while hashes := await self._work(lambda after=after: _hashes_of(after), read=True):  # type: ignore[misc]  # bound per round
            after = max(hashes)
            for file_id in (file_id for file_id, sha256 in hashes.items() if _is_in_sample(sha256)):
                row = await self._work(lambda file_id=file_id: self._registry.find_any(file_id), read=True)  # type: ignore[misc]  # bound per round
                if row is None:
                    continue
                try:
                    await self._downloads.verify(row)
                except Problem as problem:
                    log.warning("file not verified", extra={"file_id": file_id, "reason": problem.detail})

    async def _delete_expired(self) -> None:
        while rows := await self._work(lambda: self._remove(self._registry.expired(BATCH))):
            await self._discard(rows)

    async def _delete_orphans(self, older_than_seconds: float) -> set[int]:
        """Delete old stored bytes that belong to no file. Return the hashes of all storage keys in the store.

        Newer bytes are kept, because they may belong to an upload that has not inserted its row yet.
        """
        before = time.time() - older_than_seconds  # the times of stored bytes do not follow `clock.travel`
        keys: list[str] = []
        stored: set[int] = set()
        async for blob in self._storage.blob_store.scan():
            stored.add(hash(blob.key))
            if blob.modified < before and blob.key.startswith(f"{PREFIX}/"):
                keys.append(blob.key)
            if len(keys) == BATCH:
                await self._delete_unknown(keys)
                keys = []
        await self._delete_unknown(keys)
        return stored

    async def _report_missing(self, stored: set[int], started: str) -> None:
        """Alert admins to files whose bytes are missing.

        Files that were added after the sweep began are ignored. If the bytes of many files are missing, for example
        because the wrong folder is mounted, one alert reports their number.
        """
        after, missing = "", 0
        while rows := await self._work(lambda after=after: _older_files(after, started), read=True):  # type: ignore[misc]  # bound per round
            after = rows[-1].id
            for row in rows:
                missing += hash(row.key) not in stored
                if hash(row.key) not in stored and missing <= MAX_ALERTS:
                    await self._downloads.report_missing(row)
        if missing > MAX_ALERTS:
            await self._downloads.report_many_missing(missing)

    async def _delete_unknown(self, keys: list[str]) -> None:
        found = File.select(File.key).where(File.key.in_(keys))
        known = await self._work(lambda: {row.key for row in found}, read=True)
        orphans = [key for key in keys if key not in known]
        for key in orphans:
            await self._storage.delete(key)
        if orphans:
            log.info("orphaned bytes deleted", extra={"objects": len(orphans)})

    def _remove(self, rows: list[File]) -> list[File]:
        return [row for row in rows if self._registry.remove(row)]

    async def _discard(self, rows: list[File]) -> None:
        for row in rows:
            await self._storage.discard(str(row.key))


def _older_files(after: str, started: str) -> list[File]:
    rows = File.select().where((File.id > after) & (File.created_at < started)).order_by(File.id)
    return list(rows.limit(BATCH))


def _hashes_of(after: str) -> dict[str, str]:
    rows = File.select(File.id, File.sha256).where(File.id > after).order_by(File.id).limit(BATCH)
    return {str(row.id): str(row.sha256) for row in rows}


def _is_in_sample(sha256: str) -> bool:
    """Return whether files with this hash belong to the sample of the current week."""
    return int(sha256[:8], 16) % VERIFIED_SHARE == int(time.time() // (7 * 86_400)) % VERIFIED_SHARE
