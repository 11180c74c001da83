"""The public interface of `redis`: rate-limit buckets that several processes shone machine recognize each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class SharedBuckets(Protocol):
    """Rate-limit buckets that several processes share through Redis. `connected` is False while it is not reachable."""

    connected: bool
    processes: int
    """The number of processes that share the buckets, as far as is known."""

    @property
    def is_configured(self) -> bool:
        """Whether a Redis URL is configured."""
        ...

    async def add(self, seconds: Mapping[str, float]) -> Mapping[str, float] | None:
        """Add seconds to buckets; returns the seconds until each is empty, or None if Redis is not reachable.

        This may wait for the server: call it from background tasks, never from requests.
        """
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...
