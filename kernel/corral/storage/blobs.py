"""The protocol of blob stores, which keep files outside the database. Plugins provide the stores.

A blob is always stored completely or not at all. It is durable before `put` returns, so a row can safely refer to it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import NamedTuple, Protocol


class Blob(NamedTuple):
    """A stored blob: its size in bytes and its SHA-256 hash in hex."""

    size: int
    sha256: str


class BlobInfo(NamedTuple):
    """Information about a blob that `scan` found: key, size in bytes, and modification time in epoch seconds."""

    key: str
    size: int
    modified: float


class BlobMissing(LookupError):
    """Raised when the store works but contains no blob with this key."""


class BlobStore(Protocol):
    """Stores blobs under keys that the caller chooses. Each blob needs a new key.

    A key consists of lower-case letters, digits, `._-` and `/`. If the store is not available, its methods raise
    `Unavailable`; there is no fallback.
    """

    async def put(self, key: str, stream: AsyncIterable[bytes], *, limit: int | None = None) -> Blob:
        """Store the stream durably. If the stream exceeds `limit` bytes, store nothing and raise `TooLarge`."""

    async def read(self, key: str, start: int = 0, stop: int | None = None) -> AsyncGenerator[bytes, None]:
        """Return the bytes from `start` up to `stop` (exclusive) in chunks. Raise `BlobMissing` if the blob is missing.

        `aclose()` ends the iteration early.
        """

    async def delete(self, key: str) -> None:
        """Delete the blob if it exists."""

    def scan(self) -> AsyncGenerator[BlobInfo, None]:
        """Iterate over all blobs, in any order, for example to find orphaned blobs."""

    async def sweep(self, older_than_seconds: float) -> int:
        """Delete files that interrupted uploads left behind and that are more than `older_than_seconds` seconds old.

        Return the number of deleted files.
        """

    async def probe(self) -> None:
        """Write and delete a file to check that the store works. The health check of the store calls this method."""
