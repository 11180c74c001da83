"""Notifications between processes. A notification contains no events; it only says that the log has new events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Bus(Protocol):
    """Notifies all processes of new events. Notifications may be lost, since the log is also polled every 0.5 s."""

    def notify(self) -> None:
        """Announce new events. Never blocks and never fails."""
        ...

    async def start(self, wake: Callable[[], None]) -> None:
        """Call `wake` on the event loop whenever any process sends a notification."""
        ...

    async def stop(self) -> None:
        """Stop listening for notifications."""
        ...


class MemoryBus:
    """Notifications within one process."""

    def __init__(self) -> None:
        self._wake: Callable[[], None] = lambda: None

    def notify(self) -> None:
        self._wake()

    async def start(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    async def stop(self) -> None:
        self._wake = lambda: None
