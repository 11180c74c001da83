"""The background tasks and call-backs of one plugin, guarded like everything else of it that is called."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from corral import current_call
from corral.errors import Failure
from corral.plugins.guard import Steps, Terms
from corral.plugins.guarded import Guards
from corral.plugins.quarantine import LostCall, PluginQuarantine
from corral.plugins.record import PluginRecord
from corral.plugins.registry import PluginRegistry

log = logging.getLogger("corral.plugins")

LOOK_SECONDS = 0.5
HOOK = "supervise"


class TaskEnded(Exception):
    """As an error of the list: a background task that shall go on for ever came to its end."""


class PluginTasks:
    """Implements `corral.supervisor.Owner`."""

    def __init__(
        self, warden: PluginQuarantine, guards: Guards, loaded: PluginRecord, registry: PluginRegistry
    ) -> None:
        self._warden, self._guards, self._loaded, self._registry = warden, guards, loaded, registry

    def task(self, name: str, run: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """A background task whose steps are guarded."""
        guard = self._guards.put(self._loaded, f"task {name}", run, Terms(hook=HOOK, counts=False))

        async def guarded() -> None:
            current_call.room.set(self._loaded.name)
            await Steps(guard, run())

        return guarded

    def once(self, name: str, run: Callable[..., Awaitable[None]], seconds: float) -> Callable[..., Awaitable[None]]:
        """A call-back that is awaited once, for at most so long; what it raises is counted and goes no further."""
        guard = self._guards.put(self._loaded, name, run, Terms(hook=HOOK, otherwise=None))

        async def guarded(*arguments: object) -> None:
            try:
                async with asyncio.timeout(seconds):
                    await guard.awaited(run(*arguments))
            except TimeoutError:
                self._warden.strike(self._loaded, name, LostCall(f"it took longer than {seconds:g} s"))
            except Failure as failure:
                log.warning("a call-back failed", extra={"plugin": self._loaded.name, "reason": str(failure)})

        return guarded

    def failed(self, task: str, error: BaseException | None) -> None:
        self._registry.record(self._loaded.name, f"task {task}", error or TaskEnded("it ended"), None)

    async def held(self, task: str) -> None:
        self._warden.hold(self._loaded, f"the background task {task} does not stay up")
        while not self._loaded.active:  # noqa: ASYNC110  (states change in several places, and rarely)
            await asyncio.sleep(LOOK_SECONDS)
