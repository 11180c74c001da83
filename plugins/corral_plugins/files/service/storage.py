"""Access to the file store: through its circuit breaker, measured, and with keys that no client chooses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import TypeVar

from corral import clock
from corral.errors import Problem, TooLarge, Unavailable
from corral.ids import new_id
from corral.storage.blobs import Blob, BlobMissing, BlobStore
from corral_plugins.circuit_breakers.api import Breakers, CircuitOpen, Verdict, judge_outcome
from corral_plugins.files.service.metrics import FileMetrics
from corral_plugins.files.service.s3 import S3Blobs

BREAKER = "s3"
PREFIX = "files"
RETRY_SECONDS = 5
T = TypeVar("T")


class SourceFailed(Exception):
    """The stream of an upload failed, not the store; `reason` is the failure of the stream."""

    def __init__(self, reason: BaseException) -> None:
        self.reason = reason
        super().__init__(str(reason))


def new_key() -> str:
    """Return a new storage key: a random id under the date, so that no folder becomes too large."""
    return f"{PREFIX}/{clock.now()[:10].replace('-', '/')}/{new_id()}"


class FileStorage:
    """Stores and reads the bytes of files. An object store is guarded by the circuit breaker `s3`."""

    breakers: Breakers | None = None

    def __init__(self, blobs: BlobStore, metrics: FileMetrics) -> None:
        self._blobs, self._metrics = blobs, metrics

    @property
    def blobs(self) -> BlobStore:
        """The store itself, for sweeps."""
        return self._blobs

    @property
    def object_store(self) -> S3Blobs | None:
        """The object store, or None if files are kept in a folder."""
        return self._blobs if isinstance(self._blobs, S3Blobs) else None

    async def put(self, key: str, stream: AsyncIterable[bytes]) -> Blob:
        """Store a stream durably. Raises what the stream raises, and `Unavailable` for failures of the store."""
        try:
            return await self._guarded("put", lambda: self._blobs.put(key, _marked(stream)))
        except SourceFailed as failed:
            raise failed.reason from None

    async def read(self, key: str, start: int = 0, stop: int | None = None) -> AsyncGenerator[bytes, None]:
        """Open a blob and return its chunks. Raise `BlobMissing` and `Unavailable`."""
        return await self._guarded("get", lambda: self._blobs.read(key, start, stop))

    async def delete(self, key: str) -> None:
        """Delete a blob if it exists."""
        await self._guarded("delete", lambda: self._blobs.delete(key))

    async def discard(self, key: str) -> None:
        """Delete the bytes of a file whose row is gone. If the store is down, the sweep deletes them later."""
        with contextlib.suppress(Problem):
            await self.delete(key)

    async def _guarded(self, op: str, call: Callable[[], Awaitable[T]]) -> T:
        began = time.perf_counter()
        try:
            if self.breakers is None or self.object_store is None:
                return await call()
            return await self.breakers.guard(BREAKER, call, judge=_judge)
        except CircuitOpen as problem:
            detail = "The file store failed repeatedly and is not asked for now; try again later."
            raise Unavailable(detail, retry_after=problem.retry_after, code="dependency_unavailable") from problem
        except Unavailable as problem:
            problem.headers["Retry-After"] = str(RETRY_SECONDS)
            raise
        finally:
            self._metrics.observe_storage(op, time.perf_counter() - began)


async def _marked(stream: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Pass a stream on. Its own failures are wrapped, so that they do not count as failures of the store."""
    try:
        async for chunk in stream:
            yield chunk
    except Exception as failure:
        raise SourceFailed(failure) from failure


def _judge(outcome: object) -> Verdict:
    if isinstance(outcome, SourceFailed | BlobMissing | TooLarge):
        return "neutral"
    if isinstance(outcome, Problem) and outcome.code == "storage_full":
        return "failure"
    return judge_outcome(outcome)
