"""The runtime interface of a plugin: access to services, and guarded background tasks and callbacks."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar, get_args

from corral.background_tasks import Supervisor
from corral.errors import ExpectedFailure
from corral.plugins.container import Container
from corral.plugins.guard import Guard, Guards
from corral.plugins.record import PluginRecord, State
from corral.plugins.registry import PluginRegistry

log = logging.getLogger("corral.plugins")
T = TypeVar("T")

SERVING_SECONDS, DRAINING_SECONDS = 30.0, 60.0
LOOK_SECONDS = 0.5
HOOK = "supervise"


class TaskEnded(Exception):
    """An entry in a plugin's list of errors for a background task that returned instead of running until shutdown."""


class LifecycleCallbacks:
    """The server's address, and plugins' callbacks for the startup and shutdown of the server.

    `address` is None until the server listens.
    """

    def __init__(self) -> None:
        self.address: str | None = None
        self.serving: list[Callable[[str], Awaitable[None]]] = []
        self.draining: list[Callable[[], Awaitable[None]]] = []


@dataclasses.dataclass(eq=False)
class PluginRuntime:
    """The runtime interface of one plugin. Implements `corral.plugin.Runtime` and `corral.background_tasks.Owner`."""

    _record: PluginRecord
    _container: Container
    _guards: Guards
    _registry: PluginRegistry
    _supervisor: Supervisor
    _lifecycle: LifecycleCallbacks
    _supervised: list[str] = dataclasses.field(default_factory=list)

    @property
    def address(self) -> str | None:
        return self._lifecycle.address

    def service(self, kind: Callable[..., T]) -> T:
        service: T = self._container.find(kind, self._record, optional=False, where="start()")
        return service

    def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        full = f"{self._record.name}.{name}"
        guard = Guard(self._guards, self._record, HOOK, f"task {name}", run, counts=False, states=get_args(State))
        self._supervised.append(full)
        self._supervisor.start(full, guard.call_async, self)

    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None:
        self._lifecycle.serving.append(self.guarded_callback("when_serving", run, SERVING_SECONDS))

    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None:
        self._lifecycle.draining.append(self.guarded_callback("when_draining", run, DRAINING_SECONDS))

    def guarded_callback(
        self, name: str, run: Callable[..., Awaitable[None]], seconds: float
    ) -> Callable[..., Awaitable[None]]:
        """Return the callback wrapped in a guard that cancels calls after `seconds`.

        Errors in the callback are counted against the plugin and not raised. Expected failures
        (`corral.errors.ExpectedFailure`) are only logged.
        """
        guard = Guard(self._guards, self._record, HOOK, name, run, default=None, states=get_args(State))

        async def guarded(*arguments: object) -> None:
            try:
                async with asyncio.timeout(seconds):
                    await guard.call_async(*arguments)
            except TimeoutError:
                error = TimeoutError(f"the callback took longer than {seconds:g} seconds")
                self._guards.quarantine.count_error(self._record, name, error)
            except ExpectedFailure as failure:
                log.warning("a callback failed", extra={"plugin": self._record.name, "reason": str(failure)})

        return guarded

    def failed(self, task: str, error: BaseException | None) -> None:
        self._registry.add_error(self._record.name, f"task {task}", error or TaskEnded("it ended"), None)

    async def restarts_exhausted(self, task: str) -> None:
        """Quarantine the plugin, and wait until it is active again."""
        self._guards.quarantine.suspend(self._record, f"the background task {task} keeps failing")
        while not self._record.active:  # noqa: ASYNC110  (states change in several places, and rarely)
            await asyncio.sleep(LOOK_SECONDS)

    async def end_tasks(self) -> None:
        """Stop the background tasks of a plugin whose start failed."""
        await asyncio.gather(*map(self._supervisor.stop_task, self._supervised))
