"""The protocol of shared job queues, which pass the ids of new jobs to job processes. Ids may be lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol


class SharedJobQueue(Protocol):
    """A shared job queue, which passes the ids of new jobs to the processes that run jobs.

    The database rows determine which jobs run, and the processes also poll them. A lost id therefore delays a job by a
    few seconds, and a duplicate id has no effect.
    """

    def announce(self, ids: Sequence[str]) -> None:
        """Announce new job rows. This method is called on the event loop, never blocks, and never fails."""
        ...

    async def start(self) -> None:
        """Connect to the queue. Called before the first call to `announce`."""
        ...

    async def stop(self) -> None:
        """Disconnect from the queue. Called after the last call to `announce`."""
        ...

    def receive(self, take: Callable[[str], None], stopping: threading.Event) -> None:
        """Pass each received id to `take` until SIGTERM or SIGINT sets `stopping`.

        `take` returns when the next job may start. This method blocks the main thread and handles its signals; a second
        signal raises `SystemExit`. The method continues to run during outages of the queue.
        """
        ...
