"""The bell between processes. It carries no events: it only says that there are new ones in the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Bus(Protocol):
    """Rings in every process. Losing a ring is harmless: the log is looked at every 0.5 s anyway."""

    def ring(self) -> None:
        """Announce. Never blocks and never fails."""
        ...

    async def start(self, wake: Callable[[], None]) -> None:
        """Call `wake` on the loop whenever any process rings."""
        ...

    async def stop(self) -> None:
        """Stop listening."""
        ...


class MemoryBus:
    """The bell of one process."""

    def __init__(self) -> None:
        self._wake: Callable[[], None] = lambda: None

    def ring(self) -> None:
        self._wake()

    async def start(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    async def stop(self) -> None:
        self._wake = lambda: None
