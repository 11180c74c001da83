"""What a plugin may do while it runs: `corral.plugin.Runtime`, for one plugin of a running kernel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from corral.container import Container, Room
from corral.loader import Loaded
from corral.supervisor import Supervisor

T = TypeVar("T")


class _Kernel(Protocol):
    container: Container
    supervisor: Supervisor
    address: str | None

    def room(self, loaded: Loaded) -> Room: ...
    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None: ...
    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None: ...


class PluginRuntime:
    """Implements `corral.plugin.Runtime`."""

    def __init__(self, kernel: _Kernel, loaded: Loaded) -> None:
        self._kernel, self._loaded = kernel, loaded
        self.when_serving, self.when_draining = kernel.when_serving, kernel.when_draining

    @property
    def address(self) -> str | None:
        return self._kernel.address

    def service(self, kind: type[T]) -> T:
        kernel = self._kernel
        service: T = kernel.container.find(kind, kernel.room(self._loaded), optional=False, where="start()")
        return service

    def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        self._kernel.supervisor.start(f"{self._loaded.name}.{name}", run)
