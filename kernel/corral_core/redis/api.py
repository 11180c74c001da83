"""The public interface of the `redis` plugin: rate-limit buckets that several processes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class SharedBuckets(Protocol):
    """Rate-limit buckets that several processes share through Redis.

    `connected` is False while Redis cannot be reached.
    """

    connected: bool
    processes: int
    """The number of processes that share the buckets, as of the last successful call of `add`."""

    @property
    def is_configured(self) -> bool:
        """Whether `[redis] url` is set."""
        ...

    async def add(self, seconds: Mapping[str, float]) -> Mapping[str, float] | None:
        """Add requests to rate-limit buckets. Return the seconds until each bucket is empty.

        `seconds` maps the key of each bucket to the time that the bucket needs to drain the added requests. Return None
        if Redis cannot be reached. This method waits for the Redis server, so call it only from background tasks, never
        while handling a request.
        """
        ...

    async def close(self) -> None:
        """Close the connection to Redis."""
        ...
