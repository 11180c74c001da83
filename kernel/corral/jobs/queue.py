"""A shared queue that tells job processes of new job rows at once. It carries ids alone, and may forget them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol


class JobQueue(Protocol):
    """The rows decide what is done, and are looked at anyway: a lost id costs some seconds, a doubled one nothing."""

    def put(self, ids: Sequence[str]) -> None:
        """Announce new job rows. Called on the loop; never blocks and never fails."""
        ...

    async def start(self) -> None:
        """Before the first `put`."""
        ...

    async def stop(self) -> None:
        """After the last one."""
        ...

    def work(self, take: Callable[[str], None], stopping: threading.Event) -> None:
        """Give each id to `take`, which returns when there is room for the next, until SIGTERM or SIGINT, which sets
        `stopping`.

        Blocks the main thread, whose signals it handles; a second one raises `SystemExit`. It lasts out an outage.
        """
        ...
