"""`Kernel` to ASGI: binds every route of the active plugins, and gives the application that servers and tests run."""

from __future__ import annotations

import functools

from corral.asgi import app as quart_app
from corral.asgi import closed, sockets
from corral.asgi.access_log import AccessLog
from corral.asgi.cors import Cors
from corral.asgi.endpoint import Endpoint
from corral.asgi.path import RequestPath
from corral.asgi.table import BASE, Clash, Table
from corral.auth.permissions import Permissions
from corral.http.client import ClientAddress, Hosts
from corral.http.idempotency import Idempotency
from corral.http.routes import Route
from corral.http.sockets import Socket
from corral.kernel import Kernel
from corral.openapi import ApiDocument, document
from corral.plugin import Audit, LeaseCallers
from corral.plugins.container import Scope
from corral.plugins.record import PluginRecord, block_dependants

PREFIXES = ("", BASE)  # of sockets
NOBODY = Scope("", frozenset(), frozenset())


class Application:
    """`app` is the ASGI application (Quart), `path` the request path it serves with. Raises `Refused` like `boot`."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.endpoints: list[Endpoint] = []
        table = Table()
        before = kernel.active
        for loaded in sorted(before, key=lambda item: not item.found.built_in):  # which keep their paths
            loaded.attempt(self._add_routes, loaded, table)
        block_dependants(kernel.plugins)
        for loaded in before:
            if not loaded.serves:
                kernel.registry.publish(loaded)
        kernel.refuse_without_essentials()
        closed.close(table, kernel.plugins, self.endpoints)
        config = kernel.config
        self.path = RequestPath(
            table=table,
            database=kernel.database,
            feed=kernel.feed,
            credentials=kernel.credentials,
            idempotency=Idempotency(kernel.keyring),
            metrics=kernel.metrics,
            hosts=Hosts(config.server.public_url, config.server.allowed_hosts),
            client=ClientAddress(config.server.trusted_proxies),
            gates=[gate for loaded in kernel.active for gate in loaded.contributed.gates],
            redactor=kernel.redactor,
            record=kernel.registry.record,
            access_log=AccessLog(kernel.settings),
            leases=kernel.container.find(LeaseCallers, NOBODY, optional=True, where="the request path"),
            audit=kernel.container.find(Audit, NOBODY, optional=True, where="the request path"),
        )
        kernel.container.get(ApiDocument).describe(endpoint.route for endpoint in self.endpoints)
        kernel.registry.listeners.append(self._follow)
        self._follow(*kernel.plugins)
        hsts = (config.server.public_url or "").startswith("https://")
        sender = quart_app.Sender(self.path.lasting, hsts=hsts, cors=Cors(kernel.settings))
        self.app = quart_app.build(
            self.path,
            self.endpoints,
            sockets.connection_class(self.path, self._sockets(), sender),
            sender,
            body_timeout=config.server.body_timeout_seconds,
            fast_dispatch=config.server.fast_dispatch,
        )

    def _sockets(self) -> dict[str, sockets.Served]:
        served = {path: sockets.Served(loaded) for loaded, path in closed.sockets(self.kernel.plugins)}
        served.update(pair for loaded in self.kernel.active for pair in loaded.bound.sockets)
        return {prefix + path: each for path, each in served.items() for prefix in PREFIXES}

    def _socket(self, loaded: PluginRecord, item: Socket) -> sockets.Served:
        serve = self.kernel.container.bind(item.serve, self.kernel.scope(loaded), skip=("connection",))
        return sockets.Served(loaded, self.kernel.guards.route(loaded, f"WS {item.path}", serve))

    def _add_routes(self, loaded: PluginRecord, table: Table) -> None:
        permissions = self.kernel.container.get(Permissions)
        made: list[Endpoint] = []
        own = Table()  # raises `Clash` when a plugin declares an operation twice
        for group in loaded.contributed.routes:
            for route in group:
                route.plugin = loaded.name
                _check(route, permissions)
                made.append(Endpoint(route, self.kernel.container, self.kernel.scope(loaded)))
                made[-1].handler = self.kernel.guards.route(loaded, route.label, route.handler)
                own.add(made[-1])
        loaded.bound.sockets = [(item.path, self._socket(loaded, item)) for item in loaded.contributed.sockets]
        if not loaded.found.built_in:  # what has no schema would leave everybody without the document
            document([each.route for each in made], title="", version="", public_url=None)
        clashes = [other for endpoint in made if (other := table.clash(endpoint.route)) is not None]
        for _, served in clashes:
            rival = next(item for item in self.kernel.plugins if item.name == served.plugin)
            if rival.active and not rival.found.built_in:  # neither has a better claim; a built-in one keeps its paths
                rival.fail(f"{served.label} is declared by {loaded.name} too")
        if clashes:
            raise Clash(*clashes[0])
        for endpoint in made:
            table.add(endpoint)
        if not loaded.found.built_in:
            self.kernel.database.plugin_by_label |= {endpoint.label: loaded.name for endpoint in made}
        self.endpoints.extend(made)

    def _follow(self, *changed: PluginRecord) -> None:
        """Routes of plugins out of service answer 503 from now on, or again as before."""
        plugins = {loaded.name: loaded for loaded in changed}
        for endpoint in self.endpoints:
            if loaded := plugins.get(endpoint.route.plugin):
                endpoint.door = None if loaded.serves else functools.partial(closed.out_of_service, loaded)
            endpoint.rebind()


def _check(route: Route, permissions: Permissions) -> None:
    if not route.summary:
        raise ValueError(f"{route.label}: the handler has no docstring")
    unknown = [need for need in route.needs if not permissions.knows(need)]
    if unknown or not route.needs:
        raise ValueError(f"{route.label}: no plugin declares the permission {', '.join(unknown) or '(needs is empty)'}")
