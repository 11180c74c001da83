"""The manifest and the hook implementations of the `realtime` plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from corral.auth.principal import READERS, Permission
from corral.http.routes import Routes, Socket, SocketConnection
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.realtime.routes import routes
from corral_plugins.realtime.service.hub import ViewerHub
from corral_plugins.realtime.service.replay import ReplayFactory
from corral_plugins.realtime.service.rights import PERMISSION, ViewerRights
from corral_plugins.realtime.service.socket import WebSocketServer
from corral_plugins.realtime.settings import SETTINGS


class RealtimePlugin(Plugin):
    """Realtime: live events over WebSocket and server-sent events.

    A client that reconnects continues after the last event that it received, without gaps or duplicates. Clients
    receive only events that they may read.
    """

    name = "realtime"
    requires = ("accounts", "event_log")
    permissions = (Permission(PERMISSION, "Receive events as they happen", holders=(*READERS, "agent")),)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._hub: ViewerHub | None = None

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(kind, kind) for kind in (ViewerHub, ViewerRights, ReplayFactory, WebSocketServer)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_sockets(self) -> Iterable[Socket]:
        return [Socket("/ws", _serve_socket)]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_ws_clients",
                help="Number of open WebSockets and event streams.",
                of_process=True,
                collect=_connection_counts,
            ),
            Metric(
                name="corral_ws_dropped_total",
                help="Number of events dropped because a client read them too slowly.",
                kind="counter",
                collect=_dropped_events,
            ),
        ]

    async def start(self, runtime: Runtime) -> None:
        """Start to follow the event feed and to recheck permissions.

        Before the server stops, clients are asked to reconnect.
        """
        self._hub = runtime.service(ViewerHub)
        self._hub.start()
        runtime.supervise("rights", runtime.service(ViewerRights).recheck_regularly)
        runtime.when_draining(self._hub.disconnect_all)

    async def stop(self) -> None:
        if self._hub is not None:
            self._hub.stop()


async def _serve_socket(connection: SocketConnection, sockets: WebSocketServer) -> None:
    await sockets.serve_connection(connection)


def _connection_counts(hub: ViewerHub) -> Mapping[tuple[str, ...], float]:
    return {(): float(len(hub.viewers))}


def _dropped_events(hub: ViewerHub) -> Mapping[tuple[str, ...], float]:
    return {(): float(hub.dropped)}
