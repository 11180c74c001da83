"""The Quart application.

The pipeline serves declared routes through Quart's extension point `asgi_http_class`. Quart itself serves blueprints,
static files and all paths that the router does not know. Quart's errors become problem documents as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

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
from corral.asgi.response import problem_response
from corral.errors import Problem

CODES = {400: "malformed_request", 408: "request_timeout", 413: "payload_too_large"}  # of Quart's own errors


class LazyMap(QuartMap):
    """A URL map that compiles the rules of declared routes only when Quart first looks up a rule.

    Quart never looks up a rule while the router serves all requests, so the compilation is usually saved.
    """

    deferring = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._deferred: list[RuleFactory] = []
        super().__init__(*arguments, **options)

    def add(self, rulefactory: RuleFactory) -> None:
        # Rules that are not declared routes are compiled at once, so that a malformed rule fails where it is added.
        (self._deferred.append if self.deferring else super().add)(rulefactory)

    def update(self) -> None:
        deferred, self._deferred = self._deferred, []
        for each in deferred:
            super().add(each)
        super().update()


class QuartApp(Quart):
    """A Quart application that counts the URL rules which are not declared routes.

    If there are none, requests need no additional lookup in Quart's URL map.
    """

    url_map_class = LazyMap
    url_map: LazyMap
    foreign_rules = 0

    def add_url_rule(self, *arguments: Any, **options: Any) -> None:
        super().add_url_rule(*arguments, **options)
        self.foreign_rules += not self.url_map.deferring


def build(
    pipeline: Pipeline, endpoints: Iterable[Endpoint], sockets: type, *, body_timeout: float, fast_dispatch: bool
) -> Quart:
    """Return the Quart application. Declared routes are registered with Quart too, so `url_for` and blueprints work."""
    app = QuartApp("corral", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024
    app.config["BODY_TIMEOUT"] = body_timeout
    app.url_map.strict_slashes = app.url_map.merge_slashes = app.url_map.redirect_defaults = False

    async def view(**names: str) -> QuartResponse:
        return await _respond(pipeline)

    async def http_error(error: HTTPException) -> QuartResponse:
        if error.code in (404, 405, 308):  # the pipeline knows which methods the path supports
            return await _respond(pipeline)
        return await _respond(pipeline, Problem(code=CODES.get(error.code or 500, "internal")))

    app.url_map.deferring = True
    for endpoint in endpoints:
        route = endpoint.route
        for path in route.paths:
            rule = path.replace("{", "<path:" if route.rest else "<").replace("}", ">")
            name = f"{route.plugin}.{route.handler.__name__}:{path}:{route.method}".replace(".", "/")
            app.add_url_rule(rule, name, view, provide_automatic_options=False, methods=[route.method])
    app.url_map.deferring = False
    app.register_error_handler(HTTPException, http_error)

    class Connection(ASGIHTTPConnection):
        async def __call__(self, receive: Any, send: Any) -> None:
            if app.foreign_rules and pipeline.router.find(self.scope["path"]) is None:
                await super().__call__(receive, send)
            else:
                await pipeline(self.scope, receive, send)

    if fast_dispatch:
        app.asgi_http_class = Connection
    app.asgi_websocket_class = sockets
    return app


async def _respond(pipeline: Pipeline, problem: Problem | None = None) -> QuartResponse:
    """Run Quart's current request through the pipeline, or respond with the given problem."""
    is_read = False

    async def receive() -> Any:
        nonlocal is_read
        if is_read:  # Quart cancels this task when the client leaves
            await asyncio.get_running_loop().create_future()
        data = await quart_request.get_data(cache=False)
        is_read = True
        return {"type": "http.request", "body": data, "more_body": False}

    request = IncomingRequest(quart_request.scope, receive, pipeline.body_timeout)
    response = await pipeline.respond(request) if problem is None else problem_response(problem, request)
    body: Any = response.chunks if response.chunks is not None else response.body
    answer = QuartResponse(b"" if request.method == "HEAD" else body, status=response.status)
    answer.headers.clear()
    for name, value in pipeline.sender.headers(response, request):
        answer.headers.add(name.decode("latin1"), value.decode("latin1"))
    return answer
