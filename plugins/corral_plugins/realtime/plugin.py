"""The map of the plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from corral.auth.principal import READERS, Permission
from corral.http.routes import Routes
from corral.http.sockets import Socket
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.realtime.routes.socket import socket
from corral_plugins.realtime.routes.stream import routes
from corral_plugins.realtime.service.hub import Hub
from corral_plugins.realtime.settings import SETTINGS


class RealtimePlugin(Plugin):
    """Realtime: the event log, live, over WebSocket and SSE.

    A client that is cut goes on where it stopped, without a gap, a double, or anything it may not see.
    """

    name = "realtime"
    permissions = (Permission("realtime.read", "Follow events", holders=(*READERS, "agent")),)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._hub: Hub | None = None

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Hub, Hub)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_sockets(self) -> Iterable[Socket]:
        return [socket]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(name="corral_ws_clients", help="Open sockets and streams.", collect=_clients),
            Metric(
                name="corral_ws_dropped_total",
                help="Viewers lost because they were slow.",
                kind="counter",
                collect=_dropped,
            ),
        ]

    async def start(self, runtime: Runtime) -> None:
        self._hub = runtime.service(Hub)
        self._hub.start()
        runtime.supervise("rights", self._hub.watch_rights)
        runtime.when_draining(self._hub.stop)

    async def stop(self) -> None:
        if self._hub is not None:
            await self._hub.stop()


def _clients(hub: Hub) -> Mapping[tuple[str, ...], float]:
    return {(): float(hub.count)}


def _dropped(hub: Hub) -> Mapping[tuple[str, ...], float]:
    return {(): float(hub.dropped)}
