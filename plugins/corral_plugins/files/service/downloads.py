"""Downloads of byte ranges and of whole files. Whole files are checked before the first byte is sent."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import NamedTuple

from corral.database.engine import Work
from corral.errors import NotFound, Problem, Unavailable
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert
from corral.http.answers import Request, Stream
from corral.storage.blobs import BlobMissing
from corral_plugins.files.api import FileDamaged, FileMissing
from corral_plugins.files.models import File
from corral_plugins.files.service.display_names import content_disposition
from corral_plugins.files.service.media_type_detection import served_type
from corral_plugins.files.service.registry import FileRegistry
from corral_plugins.files.service.storage import RETRY_SECONDS, FileStorage

IN_MEMORY_BYTES = 1024 * 1024  # smaller files are read once; larger ones once to check them, and once to send them
_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*")
SANDBOX = "sandbox; default-src 'none'"


class ByteRange(NamedTuple):
    """A range of bytes from `start` up to, but not including, `stop`."""

    start: int
    stop: int


class Downloads:
    """Reads files, and builds the responses to download requests."""

    def __init__(self, storage: FileStorage, registry: FileRegistry, work: Work) -> None:
        self._storage, self._registry, self._work = storage, registry, work

    async def open(self, file_id: str) -> AsyncIterator[bytes]:
        """Return the bytes of a file after checking that they are undamaged.

        Raise `NotFound` if the file does not exist.
        """
        row = await self._work(lambda: self._registry.find_any(file_id), read=True)
        if row is None:
            raise NotFound("The file does not exist.")
        return await self.checked_chunks(row)

    async def respond(self, row: File, request: Request) -> Stream:
        """Return the response to a `GET` or `HEAD` request for a file.

        The response contains the whole file (200), a range of it (206), or no content if the client already has the
        file (304). Raise a `Problem` (`range_not_satisfiable`) for a range beyond the end of the file.
        """
        tag, size = f'"{row.sha256}"', int(row.size_bytes)
        headers = {
            "ETag": tag,
            "Accept-Ranges": "bytes",
            "Content-Disposition": content_disposition(str(row.name)),
            "Content-Security-Policy": SANDBOX,
        }
        media_type = served_type(str(row.detected_type))
        if _matches_etag(request.header("if-none-match"), tag):
            return Stream(_no_chunks(), media_type, headers, 304)
        wanted = None
        if request.header("if-range") in (None, tag):
            wanted = parse_range(request.header("range"), size)
        part = wanted or ByteRange(0, size)
        headers["Content-Length"] = str(part.stop - part.start)
        if wanted is not None:
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        status = 200 if wanted is None else 206
        if request.method == "HEAD":
            return Stream(_no_chunks(), media_type, headers, status)
        chunks = await (self.checked_chunks(row) if wanted is None else self.range_chunks(row, part))
        return Stream(chunks, media_type, headers, status)

    async def checked_chunks(self, row: File) -> AsyncIterator[bytes]:
        """Compare the size and hash of a file's bytes with the stored values, and then yield the bytes in chunks."""
        digest, size, kept = hashlib.sha256(), 0, []
        chunks = await self._open_chunks(row, 0, None)
        try:
            async for chunk in chunks:
                await asyncio.to_thread(digest.update, chunk)
                size += len(chunk)
                if row.size_bytes <= IN_MEMORY_BYTES and size <= IN_MEMORY_BYTES:
                    kept.append(chunk)
        finally:
            await chunks.aclose()
        if (size, digest.hexdigest()) != (row.size_bytes, row.sha256):
            raise await self.report_damage(row)
        return _iterate_chunks(kept) if size <= IN_MEMORY_BYTES else await self._open_chunks(row, 0, None)

    async def range_chunks(self, row: File, part: ByteRange) -> AsyncIterator[bytes]:
        """Yield a range of a file in chunks.

        Only the size of the file is checked, because the hash covers the whole file.
        """
        beyond = await self._open_chunks(row, row.size_bytes - 1, row.size_bytes + 1)
        try:
            last = b"".join([chunk async for chunk in beyond])
        finally:
            await beyond.aclose()
        if len(last) != 1:
            raise await self.report_damage(row)
        return await self._open_chunks(row, part.start, part.stop)

    async def _open_chunks(self, row: File, start: int, stop: int | None) -> AsyncGenerator[bytes, None]:
        try:
            return await self._storage.read(str(row.key), start, stop)
        except BlobMissing:
            raise await self.report_missing(row) from None

    async def report_damage(self, row: File) -> Problem:
        """Alert admins that a file is damaged, and return the error for the client. Damaged files are never sent."""
        alert = FileDamaged(
            kind="file_damaged",
            severity="critical",
            title="A stored file is damaged",
            detail=f"The stored bytes of the file {row.id} differ from the uploaded bytes.",
            object={"type": "file", "id": str(row.id)},
            file_id=str(row.id),
        )
        return await self._report(alert, "The stored bytes of this file are damaged; the admins have been notified.")

    async def report_missing(self, row: File) -> Problem:
        """Alert admins that this machine's store lacks a file's bytes, and return the error for the client."""
        place, remedy = self._missing_text()
        alert = FileMissing(
            kind="file_missing",
            severity="critical",
            title="The bytes of a file are missing",
            detail=f"{place} the bytes of the file {row.id}.{remedy} Otherwise, restore them from a backup.",
            object={"type": "file", "id": str(row.id)},
            file_id=str(row.id),
        )
        return await self._report(alert, f"{place} the bytes of this file; the admins have been notified.{remedy}")

    async def report_many_missing(self, count: int) -> None:
        """Raise a single alert that reports the number of files whose bytes are missing."""
        place, remedy = self._missing_text()
        detail = f"{place} the bytes of {count} files.{remedy} Otherwise, restore them from a backup."
        alert = SystemAlert(
            kind="files_missing", severity="critical", title="The bytes of many files are missing", detail=detail
        )
        await self._work(lambda: raise_alert(alert, ("files", "store")))

    def _missing_text(self) -> tuple[str, str]:
        """Return two parts of an alert: where bytes are missing, and what to do if machines share the database."""
        place, remedy = "The object store does not have", ""
        if self._storage.object_store is None:  # the folder may be one that the other machines do not see
            place = "This machine does not have"
            remedy = " If several machines share the database, set CORRAL_STORAGE_URL on each to a shared store."
        return place, remedy

    async def _report(self, alert: FileDamaged | FileMissing, detail: str) -> Problem:
        """Emit an alert, and return the error for the client.

        The error is `NotFound` if the file has just been deleted.
        """

        def unit() -> bool:
            if self._registry.find_any(alert.file_id) is None:
                return False
            raise_alert(alert, ("file", alert.file_id))
            return True

        if not await self._work(unit):
            return NotFound()
        return Unavailable(detail, retry_after=RETRY_SECONDS, code="dependency_unavailable")

    async def verify(self, row: File) -> None:
        """Check that the stored bytes of a file are complete and undamaged. The job `files.verify` calls this method.

        Raise `Unavailable` if the file is damaged or missing, or if the store is down.
        """
        chunks = await self.checked_chunks(row)
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Return the range that a `Range` header requests, or None if the whole file should be sent.

    Headers with another unit or several ranges are ignored, as HTTP allows. Raise a `Problem` (`range_not_satisfiable`)
    if the range contains no byte of the file.
    """
    found = None if header is None else _RANGE.fullmatch(header)
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
        is_valid = int(last) > 0 and size > 0
    else:
        start, stop = int(first), size if not last else min(size, int(last) + 1)
        if last and int(last) < start:
            return None
        is_valid = start < size
    if not is_valid:
        detail = f"The file has {size} bytes; the range lies beyond its end."
        raise Problem(detail, code="range_not_satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return ByteRange(start, stop)


def _matches_etag(header: str | None, tag: str) -> bool:
    tags = [each.strip().removeprefix("W/") for each in (header or "").split(",")]
    return tag in tags or tags == ["*"]


async def _iterate_chunks(chunks: list[bytes]) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        yield chunk


def _no_chunks() -> AsyncGenerator[bytes, None]:
    return _iterate_chunks([])
