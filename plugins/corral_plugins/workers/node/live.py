"""The model's text as it comes, for people: the end of it as progress of the task, at most twice a second."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any

from corral_plugins.workers.node.client import ApiError, Client, Unreachable
from corral_plugins.workers.node.endings import LeaseLost, heed, is_lost

EVERY_SECONDS = 0.5
TAIL = 500  # characters; a progress message holds no more


class LiveText:
    """Around one model request. `add` raises what the server's answers demand: `LeaseLost` or `CancelAsked`."""

    def __init__(self, client: Client, task_id: str) -> None:
        self._client, self._task_id = client, task_id
        self._tail = ""
        self._due = time.monotonic() + EVERY_SECONDS
        self._telling: asyncio.Task[dict[str, Any]] | None = None

    def add(self, text: str) -> None:
        """More text; waits for nothing."""
        self._tail = (self._tail + text)[-TAIL:]
        if self._telling is not None and self._telling.done():
            _hear(self._telling)
            self._telling = None
        if self._telling is None and self._tail.strip() and time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY_SECONDS
            call = self._client.progress(self._task_id, {"message": self._tail}, tries=1)
            self._telling = asyncio.ensure_future(call)

    async def __aenter__(self) -> LiveText:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is on its way arrives before anything that is told next."""
        if self._telling is None:
            return
        if error is not None:
            self._telling.cancel()
        await asyncio.wait({self._telling})
        if error is None:
            _hear(self._telling)


def _hear(telling: asyncio.Task[dict[str, Any]]) -> None:
    """A message that did not arrive is no loss."""
    try:
        heed(telling.result())
    except Unreachable:
        return
    except ApiError as refused:
        if is_lost(refused):
            raise LeaseLost from None
