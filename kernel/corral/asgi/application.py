"""Turns a booted `Kernel` into the ASGI application that servers run.

The routes and WebSockets of all active plugins are bound to their services here.
"""

from __future__ import annotations

import functools

from corral.asgi import quart_app, sockets
from corral.asgi.endpoint import Endpoint
from corral.asgi.pipeline import Pipeline
from corral.asgi.router import RouteConflict, Router
from corral.asgi.unavailable import add_unavailable, plugin_unavailable, unavailable_sockets
from corral.auth.permissions import Permissions
from corral.http.openapi import ApiDocument, document
from corral.http.routes import API_PREFIX, Route, Socket
from corral.kernel import Kernel
from corral.plugins.record import PluginRecord, block_dependants


class Application:
    """Contains the ASGI application (`app`, a Quart application) and the request pipeline (`pipeline`) of a kernel.

    The constructor raises `Refused` if an essential plugin fails while its routes are added, as `boot` does.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.endpoints: list[Endpoint] = []
        router = Router()
        before = kernel.active
        for loaded in sorted(before, key=lambda item: not item.found.built_in):  # built-in plugins keep their paths
            loaded.attempt(self._add_routes, loaded, router)
        block_dependants(kernel.plugins)
        for loaded in before:
            if not loaded.serves:
                kernel.registry.publish(loaded)
        kernel.refuse_without_essentials()
        add_unavailable(router, kernel.plugins, self.endpoints)
        self.pipeline = Pipeline(kernel, router)
        exempt = [path for each in self.endpoints if each.route.exempt_host for path in each.route.paths]
        self.pipeline.open_to_any_host = frozenset([*exempt, *(f"{path}/" for path in exempt)])
        kernel.container.get(ApiDocument).describe(endpoint.route for endpoint in self.endpoints)
        kernel.registry.listeners.append(self._plugins_changed)
        self._plugins_changed(*kernel.plugins)
        server = kernel.config.server
        self.app = quart_app.build(
            self.pipeline,
            self.endpoints,
            sockets.connection_class(self.pipeline, self._sockets()),
            body_timeout=server.body_timeout_seconds,
            fast_dispatch=server.fast_dispatch,
        )

    def _sockets(self) -> dict[str, sockets.SocketEndpoint]:
        found = {path: sockets.SocketEndpoint(loaded) for loaded, path in unavailable_sockets(self.kernel.plugins)}
        found.update(pair for loaded in self.kernel.active for pair in loaded.bound.sockets)
        return {prefix + path: each for path, each in found.items() for prefix in ("", API_PREFIX)}

    def _socket(self, loaded: PluginRecord, item: Socket) -> sockets.SocketEndpoint:
        serve = self.kernel.container.bind(item.serve, loaded, skip=("connection",))
        return sockets.SocketEndpoint(loaded, self.kernel.guards.wrap_route(loaded, f"WS {item.path}", serve))

    def _add_routes(self, loaded: PluginRecord, router: Router) -> None:
        permissions = self.kernel.container.get(Permissions)
        bound: list[Endpoint] = []
        own = Router()  # raises `RouteConflict` if the plugin declares an operation twice
        for group in loaded.contributed.routes:
            for route in group:
                route.plugin = loaded.name
                _check(route, permissions)
                bound.append(Endpoint(route, self.kernel.container, loaded))
                bound[-1].handler = self.kernel.guards.wrap_route(loaded, route.label, route.handler)
                own.add(bound[-1])
        loaded.bound.sockets = [(item.path, self._socket(loaded, item)) for item in loaded.contributed.sockets]
        if not loaded.found.built_in:  # a shape without a schema would break the document of the whole API
            document([each.route for each in bound], title="", version="", public_url=None)
        conflicts = [(each.route, other) for each in bound if (other := router.conflict(each.route)) is not None]
        for _, other in conflicts:
            rival = next(item for item in self.kernel.plugins if item.name == other.plugin)
            if rival.active and not rival.found.built_in:  # of two third-party plugins, both fail
                rival.fail(f"{other.label} is declared by {loaded.name} too")
        if conflicts:
            raise RouteConflict(*conflicts[0])
        for endpoint in bound:
            router.add(endpoint)
        if not loaded.found.built_in:
            self.kernel.database.plugin_by_label |= {endpoint.label: loaded.name for endpoint in bound}
        self.endpoints.extend(bound)

    def _plugins_changed(self, *changed: PluginRecord) -> None:
        """Apply the states of the changed plugins to their endpoints.

        Routes of a plugin that is out of service answer 503 from now on; routes of a plugin that serves are enabled.
        """
        plugins = {loaded.name: loaded for loaded in changed}
        for endpoint in self.endpoints:
            if loaded := plugins.get(endpoint.route.plugin):
                endpoint.unavailable = None if loaded.serves else functools.partial(plugin_unavailable, loaded)
            endpoint.rebind()


def _check(route: Route, permissions: Permissions) -> None:
    if not route.summary:
        raise ValueError(f"{route.label}: the handler has no docstring")
    if route.exempt_host and route.names:
        raise ValueError(f"{route.label}: a route with names in its path cannot be exempt from the check of the host")
    unknown = [need for need in route.needs if not permissions.is_known(need)]
    if unknown or not route.needs:
        raise ValueError(f"{route.label}: no plugin declares the permission {', '.join(unknown) or '(needs is empty)'}")
