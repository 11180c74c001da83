"""Access to the file store. Calls are measured and guarded by a circuit breaker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from typing import Any, TypeVar

from corral import clock
from corral.errors import Problem, Unavailable
from corral.ids import new_id
from corral.storage.blobs import Blob, BlobMissing, BlobStore
from corral_plugins.circuit_breakers.api import Breakers, CircuitOpen, Verdict, judge_outcome
from corral_plugins.files.service.metrics import FileMetrics
from corral_plugins.files.service.s3 import S3Blobs

BREAKER = "s3"
PREFIX = "files"
RETRY_SECONDS = 5
T = TypeVar("T")


def new_key() -> str:
    """Return a new storage key: a random id below a date folder, so that no folder becomes too large."""
    return f"{PREFIX}/{clock.now()[:10].replace('-', '/')}/{new_id()}"


class FileStorage:
    """Stores and reads the bytes of files. The circuit breaker `s3` guards calls to an object store."""

    breakers: Breakers | None = None

    def __init__(self, blobs: BlobStore, metrics: FileMetrics) -> None:
        self._blobs, self._metrics = blobs, metrics

    @property
    def blob_store(self) -> BlobStore:
        """The underlying file store, for code such as sweeps that accesses it directly."""
        return self._blobs

    @property
    def object_store(self) -> S3Blobs | None:
        """The object store, or None if files are stored in a folder."""
        return self._blobs if isinstance(self._blobs, S3Blobs) else None

    def guard_object_store(self) -> None:
        """Guard calls to the object store with the circuit breaker, if both of them exist."""
        breakers, store = self.breakers, self.object_store
        if breakers is None or store is None:
            return

        async def guard(call: Callable[[], Awaitable[Any]]) -> Any:
            return await breakers.guard(BREAKER, call, judge=_classify_outcome)

        breakers.declare(BREAKER, lambda: [BREAKER])
        store.guard = guard

    async def put(self, key: str, stream: AsyncIterable[bytes]) -> Blob:
        """Store a stream durably.

        Raises the errors of the stream, and `Unavailable` for failures of the store. While the circuit breaker is open,
        the stream is not read.
        """
        until = None
        if self.breakers is not None and self.object_store is not None:
            until = self.breakers.blocked_until(BREAKER)
        if until is not None:
            raise _store_unavailable(CircuitOpen(BREAKER, retry_at=until))
        return await self._timed("put", self._blobs.put(key, stream))

    async def read(self, key: str, start: int = 0, stop: int | None = None) -> AsyncGenerator[bytes, None]:
        """Open a blob and return its chunks.

        Raise `BlobMissing` if the blob does not exist, and `Unavailable` if the store fails.
        """
        return await self._timed("get", self._blobs.read(key, start, stop))

    async def delete(self, key: str) -> None:
        """Delete a blob if it exists."""
        await self._timed("delete", self._blobs.delete(key))

    async def discard(self, key: str) -> None:
        """Delete the bytes of a file whose row was deleted. If the store is down, a later sweep deletes the bytes."""
        with contextlib.suppress(Problem):
            await self.delete(key)

    async def _timed(self, op: str, call: Awaitable[T]) -> T:
        began = time.perf_counter()
        try:
            return await call
        except CircuitOpen as problem:
            raise _store_unavailable(problem) from problem
        except Unavailable as problem:
            problem.headers["Retry-After"] = str(RETRY_SECONDS)
            raise
        finally:
            self._metrics.observe_storage(op, time.perf_counter() - began)


def _store_unavailable(problem: CircuitOpen) -> Unavailable:
    """Return the error for a request that needs the file store while the store's circuit breaker is open."""
    detail = "The file store failed repeatedly and is not used at the moment; try again later."
    return Unavailable(detail, retry_after=problem.retry_after, code="dependency_unavailable")


def _classify_outcome(outcome: object) -> Verdict:
    return "neutral" if isinstance(outcome, BlobMissing) else judge_outcome(outcome)
