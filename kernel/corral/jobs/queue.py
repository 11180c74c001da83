"""A shared queue that announces new job rows to job processes. It carries only ids, and may lose them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol


class JobQueue(Protocol):
    """The rows decide which jobs run and are polled as well: a lost id costs seconds, a duplicate one nothing."""

    def put(self, ids: Sequence[str]) -> None:
        """Announce new job rows. Called on the loop; never blocks and never fails."""
        ...

    async def start(self) -> None:
        """Connect; called before the first `put`."""
        ...

    async def stop(self) -> None:
        """Disconnect; called after the last `put`."""
        ...

    def work(self, take: Callable[[str], None], stopping: threading.Event) -> None:
        """Pass each id to `take`, which returns when the next job may start, until SIGTERM or SIGINT sets `stopping`.

        Blocks the main thread and handles its signals; a second signal raises `SystemExit`. Survives outages.
        """
        ...
