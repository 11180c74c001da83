"""Uploads, which first store the bytes of a file and then insert its row.

Because of this order, a row without bytes cannot occur. If the process crashes between the two steps, a later sweep
deletes the bytes.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterable

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM_CONTEXT, UnitContext
from corral.errors import Invalid, Problem, TooLarge
from corral.ids import new_id
from corral.plugin import Settings
from corral.redact.redactor import Redactor, RedactorStream, redacting_machine_text
from corral.storage.blobs import Blob
from corral_plugins.files.api import FileSource, FileVisibility
from corral_plugins.files.models import File
from corral_plugins.files.service.display_names import clean_name
from corral_plugins.files.service.media_type_detection import TypeDetector
from corral_plugins.files.service.metrics import FileMetrics
from corral_plugins.files.service.quota import FileQuota
from corral_plugins.files.service.registry import FileRegistry
from corral_plugins.files.service.storage import FileStorage, new_key
from corral_plugins.files.settings import BLOCKED_TYPES, MAX_UPLOAD_BYTES

GROWTH_BYTES = 4 * 1024 * 1024  # by which the reservation of an upload of unknown size grows
RENEW_SECONDS = 60.0
LEAK_CODE = "files.secret_detected"
OUTCOMES = {
    "payload_too_large": "too_large",
    "quota_exceeded": "quota_exceeded",
    "blocked_file_type": "blocked_type",
    "dependency_unavailable": "unavailable",
    "storage_full": "unavailable",
}


class NewFile(msgspec.Struct, kw_only=True):
    """A file to store. `size` is the file's size, if it is known before the bytes arrive.

    If a run uploads the file, `lease` contains the ids of the task and the lease. `upload_key` identifies the upload,
    so that repeated uploads are recognized. `cause` lists the ids of the triggers and tasks that led to the upload,
    but is ignored if a run uploads the file.
    """

    name: str
    owner_id: str
    source: FileSource
    task_id: str | None = None
    visibility: FileVisibility = "private"
    content_type: str | None = None
    expires_at: str | None = None
    size: int | None = None
    limit: int | None = None
    lease: tuple[str, str] | None = None
    upload_key: str | None = None
    cause: tuple[str, ...] = ()


class Uploads:
    """Stores streams as files."""

    def __init__(
        self,
        storage: FileStorage,
        quota: FileQuota,
        registry: FileRegistry,
        metrics: FileMetrics,
        settings: Settings,
        redactor: Redactor,
        work: Work,
    ) -> None:
        self._storage, self._quota, self._registry, self._metrics = storage, quota, registry, metrics
        self.settings, self._redactor, self._work = settings, redactor, work

    async def store(
        self, new: NewFile, stream: AsyncIterable[bytes], *, entry: UnitContext = SYSTEM_CONTEXT
    ) -> tuple[File, bool]:
        """Store a stream. Return the row of the file, and whether the file is new.

        A repeated upload returns the row of the first upload.
        """
        try:
            row, is_new = await self._store(new, stream, entry)
        except Problem as problem:
            found = any(each.code == LEAK_CODE for each in problem.errors)
            self._metrics.count_upload("secret" if found else OUTCOMES.get(problem.code, "failed"))
            raise
        self._metrics.count_upload("stored" if is_new else "replayed")
        return row, is_new

    async def _store(self, new: NewFile, stream: AsyncIterable[bytes], entry: UnitContext) -> tuple[File, bool]:
        limit = self.settings.get(MAX_UPLOAD_BYTES) if new.limit is None else new.limit
        refuse_larger(new.size, limit)
        upload_id, key = new_id(), new_key()
        reserved = new.size or 0
        checked = _CheckedStream(self, new, upload_id, limit, reserved, entry)
        is_kept = False
        try:
            await self._work(lambda: self._quota.begin(upload_id, new.owner_id, reserved), entry=entry)
            blob = await self._storage.put(key, checked.chunks(stream))
            row, is_new = await self._work(
                functools.partial(self._commit, new, upload_id, key, blob, checked.detector.type()), entry=entry
            )
            is_kept = is_new
            return row, is_new
        finally:
            if not is_kept:  # the task of this request may be cancelled
                await asyncio.shield(self._undo(upload_id, key, entry))

    async def _undo(self, upload_id: str, key: str, entry: UnitContext) -> None:
        """Undo a failed upload: release the reserved bytes and delete the stored bytes.

        Nothing is undone if the row of the file was in fact committed. This can happen if the caller was cancelled or
        the database's response was lost.
        """
        with contextlib.suppress(Problem):  # the sweep does what is left undone here
            if await self._work(lambda: self._quota.end(upload_id), entry=entry):
                await self._storage.discard(key)

    def _commit(self, new: NewFile, upload_id: str, key: str, blob: Blob, detected: str) -> tuple[File, bool]:
        self.refuse_blocked(detected)
        source = new.source
        if new.lease is not None:
            source = msgspec.structs.replace(source, attempt_id=self._registry.attempt_of_lease(*new.lease))
        earlier = self._registry.earlier_upload(new.upload_key, sha256=blob.sha256, name=clean_name(new.name))
        if earlier is not None:
            return earlier, False
        now = clock.now()
        row = File.create(
            id=upload_id,
            owner_id=new.owner_id,
            name=clean_name(new.name),
            size_bytes=blob.size,
            sha256=blob.sha256,
            content_type=new.content_type,
            detected_type=detected,
            key=key,
            task_id=self._registry.require_task(new.task_id, "/query/task_id"),
            shared_with=new.visibility,
            source_type=source.type,
            source=msgspec.to_builtins(source),
            expires_at=new.expires_at,
            upload_key=new.upload_key,
            created_at=now,
            updated_at=now,
            version=1,
        )
        self._quota.commit(upload_id, new.owner_id, blob.size)
        self._registry.emit_uploaded(row, new.cause)
        return row, True

    def refuse_blocked(self, detected: str) -> None:
        """Raise a problem (`blocked_file_type`) if files of this type are not accepted."""
        if detected in self.settings.get(BLOCKED_TYPES):
            raise Problem(f"Files of the type {detected} are not accepted here.", code="blocked_file_type")

    async def grow(self, upload_id: str, owner_id: str, more: int, entry: UnitContext) -> None:
        """Reserve more bytes for an upload, and record that the upload is still running. `more` may be 0."""
        await self._work(lambda: self._quota.grow(upload_id, owner_id, more), entry=entry)

    def secret_scan(self) -> RedactorStream:
        """Return a new stream that detects the values of stored secrets in the text passed to it."""
        return self._redactor.stream(patterns=False)


def refuse_larger(size: int | None, limit: int) -> None:
    """Raise a problem (`payload_too_large`) if `size` exceeds `limit`."""
    if size is not None and size > limit:
        raise TooLarge(f"The file is larger than the {limit} bytes that files.max_upload_bytes allows.")


class _CheckedStream:
    """Checks the bytes of one upload as they pass through.

    The checks cover the size, the quota and the file type and, for uploads by workers and agents, secret values.
    """

    def __init__(
        self, uploads: Uploads, new: NewFile, upload_id: str, limit: int, reserved: int, entry: UnitContext
    ) -> None:
        self._uploads, self._new, self._id, self._limit, self._entry = uploads, new, upload_id, limit, entry
        self._reserved, self._size = reserved, 0
        self.detector = TypeDetector()
        self._scan = _SecretScan(uploads.secret_scan(), new) if new.source.type in ("worker", "agent") else None

    async def chunks(self, stream: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of the stream unchanged. Raise an error at the first chunk that fails a check."""
        loop = asyncio.get_running_loop()
        renewed, was_judged = loop.time(), False
        async for chunk in stream:
            self._size += len(chunk)
            refuse_larger(self._size, self._limit)
            if self._size > self._reserved or loop.time() - renewed > RENEW_SECONDS:
                await self._reserve()
                renewed = loop.time()
            self.detector.feed(chunk)
            if not was_judged and self.detector.is_head_complete:
                was_judged = True
                self._uploads.refuse_blocked(self.detector.signature() or "")
            if self._scan is not None:
                await asyncio.to_thread(self._scan.feed, chunk)
            yield chunk
        if self._scan is not None:
            await asyncio.to_thread(self._scan.end)
        self._uploads.refuse_blocked(self.detector.type())

    async def _reserve(self) -> None:
        """Reserve quota for the bytes that have arrived.

        If the size of the file is unknown, also reserve bytes in advance, unless the quota is too small for them.
        """
        missing = max(0, self._size - self._reserved)
        if self._new.size is None and 0 < missing < GROWTH_BYTES:
            with contextlib.suppress(Problem):
                await self._uploads.grow(self._id, self._new.owner_id, GROWTH_BYTES, self._entry)
                self._reserved += GROWTH_BYTES
                return
        await self._uploads.grow(self._id, self._new.owner_id, missing, self._entry)
        self._reserved += missing


class _SecretScan:
    """Searches a worker's or agent's upload for the values of stored secrets, including values that span two chunks."""

    def __init__(self, stream: RedactorStream, new: NewFile) -> None:
        self._stream, self._pending = stream, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._object = ("task", new.task_id) if new.task_id is not None else (new.source.type, new.source.id or "")

    def feed(self, chunk: bytes) -> None:
        """Check the next bytes. Raise `Invalid` if they complete a secret value."""
        text = self._decoder.decode(chunk)
        self._pending += text
        with redacting_machine_text(*self._object):
            self._compare(self._stream.feed(text))

    def end(self) -> None:
        """End the stream. Raise `Invalid` if the remaining bytes contain a secret value."""
        with redacting_machine_text(*self._object):
            self._compare(self._stream.end())

    def _compare(self, shown: str) -> None:
        if not self._pending.startswith(shown):
            detail = "The file contains the value of a stored secret; nothing was stored."
            raise Invalid.at("/file", LEAK_CODE, detail)
        self._pending = self._pending[len(shown) :]
