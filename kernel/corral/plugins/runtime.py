"""What a plugin may do while it runs: `corral.plugin.Runtime`, for one plugin of a running kernel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from corral.plugins.background import PluginTasks
from corral.plugins.container import Container, Scope
from corral.plugins.record import PluginRecord
from corral.supervisor import Supervisor

T = TypeVar("T")

SERVING_SECONDS, DRAINING_SECONDS = 30.0, 60.0


class _Kernel(Protocol):
    container: Container
    supervisor: Supervisor
    address: str | None

    def room(self, loaded: PluginRecord) -> Scope: ...
    def tasks_of(self, loaded: PluginRecord) -> PluginTasks: ...
    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None: ...
    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None: ...


class PluginRuntime:
    """Implements `corral.plugin.Runtime`."""

    def __init__(self, kernel: _Kernel, loaded: PluginRecord) -> None:
        self._kernel, self._loaded = kernel, loaded
        self._tasks: PluginTasks = kernel.tasks_of(loaded)
        self.supervised: list[str] = []

    @property
    def address(self) -> str | None:
        return self._kernel.address

    def service(self, kind: type[T]) -> T:
        kernel = self._kernel
        service: T = kernel.container.find(kind, kernel.room(self._loaded), optional=False, where="start()")
        return service

    def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        self.supervised.append(f"{self._loaded.name}.{name}")
        self._kernel.supervisor.start(self.supervised[-1], self._tasks.task(name, run), self._tasks)

    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None:
        self._kernel.when_serving(self._tasks.once("when_serving", run, SERVING_SECONDS))

    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None:
        self._kernel.when_draining(self._tasks.once("when_draining", run, DRAINING_SECONDS))
