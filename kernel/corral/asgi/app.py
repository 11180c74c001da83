"""The Quart application. Declared routes are served from the kernel's table through its seam `asgi_http_class`;
blueprints, static files and whatever the table does not know go through Quart, and fail with problem documents too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from quart import Quart, Response, request
from quart.asgi import ASGIHTTPConnection
from quart.routing import QuartMap
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RuleFactory

from corral.asgi.call import Call, Gone, Reply
from corral.asgi.cors import Cors
from corral.asgi.lasting import Lasting
from corral.asgi.path import RequestPath, problem_reply
from corral.asgi.table import paths
from corral.errors import Problem

log = logging.getLogger("corral.http")

Send = Callable[[Any], Awaitable[None]]

ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
JSON_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
NO_STORE, PRIVATE = (b"cache-control", b"no-store"), (b"cache-control", b"private, no-cache")
NO_STORE_UNDER = ("/api/v1/auth/", "/api/v1/security", "/api/v1/secrets", "/api/v1/settings", "/api/v1/admin/")


class Sender:
    """Turns replies into ASGI messages. `hsts` when the public URL is https."""

    def __init__(self, lasting: Lasting, *, hsts: bool, cors: Cors) -> None:
        self._cors = cors
        self._lasting = lasting
        self._always = ALWAYS + (((b"strict-transport-security", b"max-age=31536000"),) if hsts else ())

    def headers(self, reply: Reply, call: Call) -> list[tuple[bytes, bytes]]:
        """All headers of an answer."""
        own = reply.headers
        headers = [*self._always, (b"x-request-id", call.request_id.encode())]
        if "Cache-Control" not in own:
            headers.append(NO_STORE if call.path.startswith(NO_STORE_UNDER) else PRIVATE)
        if reply.chunks is None:
            headers.append((b"content-length", b"%d" % len(reply.body)))
        if reply.body or reply.chunks is not None:
            headers.append((b"content-type", reply.media_type))
        if "Content-Security-Policy" not in own:
            headers.append(JSON_POLICY)
        if call.quota is not None and "RateLimit-Limit" not in own:
            limit, remaining, reset = call.quota
            headers.append((b"ratelimit-limit", b"%d" % limit))
            headers.append((b"ratelimit-remaining", b"%d" % remaining))
            headers.append((b"ratelimit-reset", b"%d" % reset))
        for name, value in own.items():
            headers.append((name.lower().encode("latin1"), value.encode("latin1")))
        headers += self._cors.headers(call, reply)
        return headers

    async def send(self, reply: Reply, call: Call, send: Send) -> None:
        """Send the answer; a stream until it ends or the client leaves."""
        await send({"type": "http.response.start", "status": reply.status, "headers": self.headers(reply, call)})
        if call.method == "HEAD" or reply.chunks is None:
            body = b"" if call.method == "HEAD" else reply.body
            if call.unread:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await call.discard()
                body = b""
            await send({"type": "http.response.body", "body": body})
            return
        relaying = asyncio.ensure_future(_relay(reply.chunks, send))
        leaving = asyncio.ensure_future(call.left())
        try:
            with self._lasting.hold(call.client_ip, call.path, lambda _: leaving.cancel()):
                await asyncio.wait({relaying, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            relaying.cancel()
            await asyncio.wait({relaying})
        if not relaying.cancelled():
            relaying.result()


async def _relay(chunks: Any, send: Send) -> None:
    """Chunks as they come; the iterator is closed however this ends."""
    try:
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        await chunks.aclose()


class LaterMap(QuartMap):
    """Compiles declared rules when Quart first looks for one, which it never does while the table serves them."""

    deferring = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._later: list[RuleFactory] = []
        super().__init__(*arguments, **options)

    def add(self, rulefactory: RuleFactory) -> None:
        (self._later.append if self.deferring else super().add)(rulefactory)  # what others add fails where it is added

    def update(self) -> None:
        later, self._later = self._later, []
        for each in later:
            super().add(each)
        super().update()


class App(Quart):
    """Counts the rules added beside the declared routes, since looking through the map would cost every request."""

    url_map_class = LaterMap
    url_map: LaterMap
    foreign_rules = 0

    def add_url_rule(self, *arguments: Any, **options: Any) -> None:
        super().add_url_rule(*arguments, **options)
        self.foreign_rules += not self.url_map.deferring


def connection_class(path: RequestPath, sender: Sender, body_timeout: float, serves: Callable[[str], bool]) -> type:
    """The connection that looks into the table first. `serves` tells which paths are Quart's own."""

    class Connection(ASGIHTTPConnection):
        async def __call__(self, receive: Any, send: Any) -> None:
            if serves(self.scope["path"]):
                await super().__call__(receive, send)
                return
            call = Call(self.scope, receive, body_timeout)
            try:
                reply = await path.answer(call)
                await sender.send(reply, call, send)
            except Gone:
                log.debug("the client left", extra={"request_id": call.request_id})

    return Connection


def build(
    path: RequestPath, endpoints: list[Any], sockets: type, sender: Sender, *, body_timeout: float, fast_dispatch: bool
) -> Quart:
    """The application. Every declared route is registered with Quart as well, so `url_for` and blueprints work."""
    app = App("corral", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024
    app.config["BODY_TIMEOUT"] = body_timeout
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.url_map.redirect_defaults = False
    app.url_map.deferring = True
    view = _view(path, sender, body_timeout)
    for endpoint in endpoints:
        for pattern in paths(endpoint.route):
            rule = pattern.replace("{", "<path:" if endpoint.route.rest else "<").replace("}", ">")
            methods = [endpoint.route.method]
            name = f"{endpoint.route.plugin}.{endpoint.route.handler.__name__}:{pattern}:{methods[0]}"
            app.add_url_rule(rule, name.replace(".", "/"), view, provide_automatic_options=False, methods=methods)
    app.register_error_handler(HTTPException, _http_error(path, sender, body_timeout))
    app.url_map.deferring = False

    def serves(url_path: str) -> bool:
        """Quart's own: there are rules beside the declared routes, and the table does not know the path."""
        return app.foreign_rules > 0 and path.table.find(url_path) is None

    if fast_dispatch:
        app.asgi_http_class = connection_class(path, sender, body_timeout, serves)
    app.asgi_websocket_class = sockets
    return app


def _view(path: RequestPath, sender: Sender, body_timeout: float) -> Callable[..., Awaitable[Response]]:
    async def view(**names: str) -> Response:
        return await _through_quart(path, sender, body_timeout)

    return view


async def _through_quart(path: RequestPath, sender: Sender, body_timeout: float) -> Response:
    """The same request path, entered from a Quart view."""
    done = False

    async def receive() -> Any:
        nonlocal done
        if done:  # Quart ends this task when the client leaves
            await asyncio.get_running_loop().create_future()
        data = await request.get_data(cache=False)
        done = True
        return {"type": "http.request", "body": data, "more_body": False}

    call = Call(request.scope, receive, body_timeout)
    return _response(await path.answer(call), call, sender)


def _http_error(
    path: RequestPath, sender: Sender, body_timeout: float
) -> Callable[[HTTPException], Awaitable[Response]]:
    codes = {413: "payload_too_large", 408: "request_timeout", 400: "malformed_request"}

    async def handle(error: HTTPException) -> Response:
        async def nothing() -> Any:
            return {"type": "http.disconnect"}

        call = Call(request.scope, nothing, body_timeout)
        if error.code in (404, 405, 308):  # let the table say what is allowed there
            return _response(await path.answer(call), call, sender)
        problem = Problem(code=codes.get(error.code or 500, "internal"))
        return _response(problem_reply(problem, call), call, sender)

    return handle


def _response(reply: Reply, call: Call, sender: Sender) -> Response:
    body: Any = reply.chunks if reply.chunks is not None else reply.body
    response = Response(b"" if call.method == "HEAD" else body, status=reply.status)
    response.headers.clear()
    for name, value in sender.headers(reply, call):
        response.headers.add(name.decode("latin1"), value.decode("latin1"))
    return response
