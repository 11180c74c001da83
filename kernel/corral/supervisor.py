"""Background tasks that are restarted with backoff when they end or raise, and ended together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from corral.errors import Unavailable

log = logging.getLogger("corral.kernel")

FIRST_DELAY, LAST_DELAY, CALM_AFTER = 1.0, 60.0, 60.0
GROWTH = 1.3  # five restarts take 9 s: a plugin whose task does not stay is known within 10 s
RESTARTS = 5
AWAY_DELAY = 2.0  # what a task needs is back within 10 s of its dependency


class Owner(Protocol):
    """Whose task it is."""

    def failed(self, task: str, error: BaseException | None) -> None:
        """It raised, or ended (None)."""
        ...

    async def held(self, task: str) -> None:
        """It does not stay up; returns when it shall be tried again."""
        ...


class Supervisor:
    """Keeps named tasks running on the loop."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, run: Callable[[], Awaitable[None]], owner: Owner | None = None) -> None:
        """Run until `stop`. After five restarts in a row it is the owner's turn; `Unavailable` only makes it wait."""
        self._tasks[name] = asyncio.get_running_loop().create_task(self._keep(name, run, owner), name=name)

    async def end(self, name: str) -> None:
        """End one task."""
        if (task := self._tasks.pop(name, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """End all tasks and wait for them."""
        await asyncio.gather(*map(self.end, tuple(self._tasks)))

    async def _keep(self, name: str, run: Callable[[], Awaitable[None]], owner: Owner | None) -> None:
        loop = asyncio.get_running_loop()
        delay, restarts = FIRST_DELAY, 0
        while True:
            began, error = loop.time(), await self._once(name, run)
            if isinstance(error, Unavailable):  # an answer of what it needs, and no error of its own
                await asyncio.sleep(AWAY_DELAY)
                continue
            if loop.time() - began > CALM_AFTER:
                delay, restarts = FIRST_DELAY, 0
            if owner is not None:
                owner.failed(name, error)
                if restarts >= RESTARTS:
                    await owner.held(name)
                    delay, restarts = FIRST_DELAY, 0
                    continue
            restarts += 1
            await asyncio.sleep(delay)
            delay = min(LAST_DELAY, delay * GROWTH)

    async def _once(self, name: str, run: Callable[[], Awaitable[None]]) -> BaseException | None:
        """Run it; what it raised. `SystemExit` ends the task and nothing else."""
        try:
            await run()
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise
        except Unavailable as away:
            log.warning("a background task waits", extra={"task": name, "reason": str(away)})
            return away
        except BaseException as error:
            log.exception("a background task failed", extra={"task": name})
            return error
        log.warning("a background task ended", extra={"task": name})
        return None
