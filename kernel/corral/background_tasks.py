"""Runs background tasks and restarts them with backoff when they return or raise an exception."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from corral.errors import Unavailable

log = logging.getLogger("corral.kernel")

INITIAL_DELAY, MAX_DELAY, RESET_AFTER = 1.0, 60.0, 60.0
GROWTH = 1.3  # five restarts take 9 s: a plugin whose task keeps failing is noticed within 10 s
RESTARTS = 5
UNAVAILABLE_DELAY = 2.0  # tasks resume within 10 s of the dependency that they need


class Owner(Protocol):
    """The owner of a background task, such as a plugin."""

    def failed(self, task: str, error: BaseException | None) -> None:
        """Called when a background task raised `error`, or returned (`error` is then None)."""
        ...

    async def restarts_exhausted(self, task: str) -> None:
        """Called when a background task keeps failing. The task is started again when this method returns."""
        ...


class Supervisor:
    """Keeps named background tasks running on the event loop."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, name: str, run: Callable[[], Awaitable[None]], owner: Owner | None = None) -> None:
        """Run a background task until `stop_task` or `stop` is called.

        After five restarts in a row, a task with an owner is restarted only when `owner.restarts_exhausted` returns. A
        task that raises `Unavailable` is restarted after a short delay, and this restart is not counted.
        """
        self._tasks[name] = asyncio.get_running_loop().create_task(self._keep_running(name, run, owner), name=name)

    async def stop_task(self, name: str) -> None:
        """Stop one task and wait until it has stopped."""
        if (task := self._tasks.pop(name, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """Stop all tasks and wait until they have stopped."""
        await asyncio.gather(*map(self.stop_task, tuple(self._tasks)))

    async def _keep_running(self, name: str, run: Callable[[], Awaitable[None]], owner: Owner | None) -> None:
        loop = asyncio.get_running_loop()
        delay, restarts = INITIAL_DELAY, 0
        while True:
            began, error = loop.time(), await self._run_once(name, run)
            if isinstance(error, Unavailable):  # a dependency failed, not the task
                await asyncio.sleep(UNAVAILABLE_DELAY)
                continue
            if loop.time() - began > RESET_AFTER:
                delay, restarts = INITIAL_DELAY, 0
            if owner is not None:
                owner.failed(name, error)
                if restarts >= RESTARTS:
                    await owner.restarts_exhausted(name)
                    delay, restarts = INITIAL_DELAY, 0
                    continue
            restarts += 1
            await asyncio.sleep(delay)
            delay = min(MAX_DELAY, delay * GROWTH)

    async def _run_once(self, name: str, run: Callable[[], Awaitable[None]]) -> BaseException | None:
        """Run the task once, and return its error or None. `SystemExit` does not end the process."""
        try:
            await run()
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise
        except Unavailable as error:
            log.warning("background task waits for a dependency", extra={"task": name, "reason": str(error)})
            return error
        except BaseException as error:
            log.exception("background task failed", extra={"task": name})
            return error
        log.warning("background task ended", extra={"task": name})
        return None


def is_cancelled() -> bool:
    """Return whether the current task itself is being cancelled. Return False outside the event loop."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return False
    return task is not None and task.cancelling() > 0
