"""Background tasks that are restarted with backoff when they end or raise, and ended together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("corral.kernel")

FIRST_DELAY, LAST_DELAY, CALM_AFTER = 1.0, 60.0, 60.0


class Supervisor:
    """Keeps named tasks running on the loop."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.restarts: dict[str, int] = {}

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run until `stop`."""
        self._tasks[name] = asyncio.get_running_loop().create_task(self._keep(name, run), name=name)

    async def end(self, name: str) -> None:
        """End one task."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """End all tasks and wait for them."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await run()
                log.warning("a background task ended", extra={"task": name})
            except Exception:
                log.exception("a background task failed", extra={"task": name})
            self.restarts[name] = self.restarts.get(name, 0) + 1
            delay = FIRST_DELAY if loop.time() - began > CALM_AFTER else min(LAST_DELAY, delay * 2)
            await asyncio.sleep(delay)
