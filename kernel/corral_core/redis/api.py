"""What other plugins may use of `redis`: buckets that several processes fill together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class SharedBuckets(Protocol):
    """What several processes count together, through Redis. Without it, or while it is lost, `connected` is false."""

    connected: bool
    processes: int
    """How many processes count together, as far as is known."""

    @property
    def is_configured(self) -> bool:
        """Whether there is a Redis."""
        ...

    async def add(self, seconds: Mapping[str, float]) -> Mapping[str, float] | None:
        """Fill buckets by these times; for each, the seconds until it is empty again. None: Redis cannot be asked.

        Takes a moment even where nobody answers: for background tasks, never for requests.
        """
        ...

    async def close(self) -> None:
        """Leave."""
        ...
