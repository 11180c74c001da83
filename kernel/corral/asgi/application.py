"""Turns a booted `Kernel` into the ASGI application that servers run.

This module binds the routes and WebSockets of all active plugins to the services that they use. The pipeline serves
declared routes through Quart's extension point `asgi_http_class`. Quart itself serves blueprints, static files and all
other paths that the router does not know. Errors that Quart raises are also returned as problem documents.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

from quart import Quart
from quart import Response as QuartResponse
from quart import request as quart_request
from quart.asgi import ASGIHTTPConnection
from quart.routing import QuartMap
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RuleFactory

from corral.asgi.endpoint import Endpoint
from corral.asgi.pipeline import Pipeline
from corral.asgi.request import IncomingRequest
from corral.asgi.router import Router
from corral.asgi.unavailable import UnavailableEndpoint, unavailable_operations
from corral.asgi.websockets import SocketEndpoint, websocket_handler
from corral.auth.permissions import Permissions
from corral.config.model import Server
from corral.errors import Problem
from corral.http.handler_signature import shape_schemas
from corral.http.routes import API_PREFIX, Route, ServedRoutes
from corral.kernel import Kernel
from corral.plugins.record import PluginRecord

CODES = {400: "malformed_request", 408: "request_timeout", 413: "payload_too_large"}  # of Quart's own errors


class Application:
    """A kernel's ASGI application (`app`, a Quart application) and its request pipeline (`pipeline`).

    The constructor raises `StartupError` if the routes of an essential plugin cannot be added.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.endpoints: list[Endpoint] = []
        self._router = Router()
        self.sockets: dict[str, SocketEndpoint] = {}
        kernel.registry.listeners.append(self._plugin_changed)
        before = kernel.active
        for loaded in sorted(before, key=lambda item: not item.found.built_in):  # built-in plugins keep their paths
            loaded.run_boot_step(self._add_routes, loaded)
        kernel.block_dependants(before)
        kernel.refuse_without_essentials()
        self._add_unavailable()
        kernel.container.get(ServedRoutes).routes = [endpoint.route for endpoint in self.endpoints]
        self.pipeline = Pipeline(kernel, self._router, self.endpoints)
        self.app = quart_application(self.pipeline, self.endpoints, kernel.config.server)
        kernel.container.get(ServedRoutes).app = self.app
        sockets = {prefix + path: each for path, each in self.sockets.items() for prefix in ("", API_PREFIX)}
        self.app.asgi_websocket_class = cast("Any", websocket_handler(self.pipeline, sockets))

    def _add_routes(self, loaded: PluginRecord) -> None:
        kernel, container = self.kernel, self.kernel.container
        routes = [route for group in loaded.contributions_to("corral_routes") for route in group]
        endpoints: list[Endpoint] = []
        for route in routes:
            route.plugin = loaded.name
            _check_route(route, container.get(Permissions))
            endpoints.append(
                Endpoint(route, container, loaded, kernel.guards.wrap_route(loaded, route.label, route.handler))
            )
        sockets = {}
        for item in loaded.contributions_to("corral_sockets"):
            serve = container.bind(item.serve, loaded, skip=("connection",))
            sockets[item.path] = SocketEndpoint(loaded, kernel.guards.wrap_route(loaded, f"WS {item.path}", serve))
        if not loaded.found.built_in:  # a shape without a schema would break the document of the whole API
            shape_schemas([(route, route.signature) for route in routes])
        self._router.add(endpoints)
        if not loaded.found.built_in:
            kernel.database.plugin_by_label |= {route.label: loaded.name for route in routes}
        self.endpoints.extend(endpoints)
        self.sockets |= sockets

    def _add_unavailable(self) -> None:
        """Add a placeholder for each operation of an inactive built-in plugin, unless another plugin serves it."""
        for loaded, label in unavailable_operations(self.kernel.plugins):
            method, _, path = label.partition(" ")
            if method == "WS":
                self.sockets.setdefault(path, SocketEndpoint(loaded))
            else:
                with contextlib.suppress(ValueError):
                    self._router.add([UnavailableEndpoint(loaded, method, path)])

    def _plugin_changed(self, changed: PluginRecord) -> None:
        """Update a plugin's endpoints after its state has changed, and bind the services of all endpoints again."""
        for endpoint in self.endpoints:
            if endpoint.route.plugin == changed.name:
                endpoint.unavailable = None if changed.in_service else changed
            endpoint.rebind()


class LazyUrlMap(QuartMap):
    """A URL map that compiles the rules of declared routes only when Quart first looks up a rule.

    If the router serves all requests, Quart never looks up a rule, which saves the 0.1 s that the compilation takes.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.declared: list[Callable[[], RuleFactory]] = []
        super().__init__(*arguments, **options)

    def update(self) -> None:
        declared, self.declared = self.declared, []
        for make_rule in declared:
            self.add(make_rule())
        super().update()


class QuartApp(Quart):
    """A Quart application whose URL map contains the declared routes, so that `url_for` and blueprints work."""

    url_map_class = LazyUrlMap
    url_map: LazyUrlMap


def quart_application(pipeline: Pipeline, endpoints: Iterable[Endpoint], server: Server) -> Quart:
    """Return the Quart application.

    With `server.fast_dispatch`, the pipeline serves declared routes and bypasses Quart.
    """
    app = QuartApp("corral", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024
    app.config["BODY_TIMEOUT"] = server.body_timeout_seconds
    app.url_map.strict_slashes = app.url_map.merge_slashes = app.url_map.redirect_defaults = False

    async def view(**names: str) -> QuartResponse:
        return await _respond(pipeline)

    async def http_error(error: HTTPException) -> QuartResponse:
        if error.code in (404, 405, 308):  # the pipeline knows which methods the path supports
            return await _respond(pipeline)
        return await _respond(pipeline, Problem(code=CODES.get(error.code or 500, "internal")))

    app.register_error_handler(HTTPException, http_error)
    for endpoint in endpoints:
        route = endpoint.route
        for path in route.paths:
            path = path.replace("{", "<path:" if route.rest else "<").replace("}", ">")
            name = f"{route.method} {path}"
            rule = functools.partial(app.url_rule_class, path, endpoint=name, methods=[route.method])
            app.url_map.declared.append(rule)
            app.view_functions[name] = view
    declared = len(app.view_functions)

    def connect(app: Quart, scope: Any) -> Any:
        if len(app.view_functions) > declared and pipeline.router.find(scope["path"]) is None:
            return ASGIHTTPConnection(app, scope)
        return functools.partial(pipeline, scope)

    if server.fast_dispatch:
        connection: Any = connect
        app.asgi_http_class = connection
    return app


async def _respond(pipeline: Pipeline, problem: Problem | None = None) -> QuartResponse:
    """Run Quart's current request through the pipeline. If `problem` is given, respond with this problem instead."""
    is_read = False

    async def receive() -> Any:
        nonlocal is_read
        if is_read:  # Quart cancels this task when the client leaves
            await asyncio.get_running_loop().create_future()
        data = await quart_request.get_data(cache=False)
        is_read = True
        return {"type": "http.request", "body": data, "more_body": False}

    # without the extensions, because the server's `corral.received` is not about this `receive`
    request = IncomingRequest({**quart_request.scope, "extensions": {}}, receive, pipeline.body_timeout)
    response = await pipeline.respond(request) if problem is None else pipeline.failure_response(problem, request)
    body: Any = response.chunks if response.chunks is not None else response.body
    answer = QuartResponse(b"" if request.method == "HEAD" else body, status=response.status)
    answer.headers.clear()
    for name, value in pipeline.sender.headers(response, request):
        answer.headers.add(name.decode("latin1"), value.decode("latin1"))
    return answer


def _check_route(route: Route, permissions: Permissions) -> None:
    """Raise `ValueError` if a declared route is incomplete or names a permission that no plugin declares."""
    if not route.summary:
        raise ValueError(f"{route.label}: the handler has no docstring")
    if route.exempt_host and route.path_parameters:
        raise ValueError(f"{route.label}: a route with path parameters cannot be exempt from the host check")
    unknown = [need for need in route.needs if not permissions.is_known(need)]
    if unknown or not route.needs:
        raise ValueError(f"{route.label}: `needs` must name known permissions, not {', '.join(unknown) or 'nothing'}")
