"""`/ws` and other sockets, on the raw ASGI messages: no task, queue or context beside the endpoint's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from corral.asgi.closed import out_of_service
from corral.asgi.path import RequestPath
from corral.errors import Malformed, NotFound, Problem, Unavailable
from corral.http.answers import Request
from corral.ids import new_id
from corral.loader import Loaded
from corral.plugin import Meter
from corral.schema.shapes import encode

log = logging.getLogger("corral.http")

SIGN_IN = frozenset({"token", "ticket", "authorization", "x-api-key"})  # in the query, in headers
REFUSED = 4403
LINGER_SECONDS, DRAIN_SECONDS = 0.25, 5.0
_draining: set[asyncio.Task[None]] = set()


class Served(NamedTuple):
    """An endpoint with its services filled in, and its plugin."""

    loaded: Loaded
    serve: Callable[..., Any]


class Connection:
    """Implements `corral.http.sockets.SocketConnection`."""

    def __init__(self, scope: Any, receive: Any, send: Any, client_ip: str, meters: Iterable[Meter]) -> None:
        self._receive, self._send, self._extensions = receive, send, scope.get("extensions") or {}
        self._meters = meters
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
        self.request = Request("GET", scope["path"], client_ip, new_id(), headers)
        self.query = dict(parse_qsl(scope["query_string"].decode("latin1"), max_num_fields=20))
        self._open, self._gone = False, False

    def count_anonymous(self) -> None:
        for meter in self._meters:
            meter.arrive(self.request.client_ip, None, anonymous=True)

    async def accept(self) -> None:
        await self._send({"type": "websocket.accept", "headers": []})
        self._open = True

    async def refuse(self, problem: Problem) -> None:
        if "websocket.http.response" not in self._extensions:
            await self._send({"type": "websocket.close", "code": 1008})
            return
        body = encode(problem.document(self.request.path, self.request.request_id))
        headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "websocket.http.response.start", "status": problem.status, "headers": headers})
        await self._send({"type": "websocket.http.response.body", "body": body})

    async def receive(self) -> str | bytes | None:
        message = await self._receive()
        if message["type"] != "websocket.receive":
            self._open, self._gone = False, True
            return None
        text: str | bytes | None = message.get("text")
        return text if text is not None else message.get("bytes")

    async def send(self, text: str) -> None:
        if not self._open:
            raise ConnectionError("the socket is closed")
        await self._send({"type": "websocket.send", "text": text})

    async def drain(self, seconds: float) -> None:
        """Take what the client still sends after the end: unread, it would reset the connection and lose the code."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                while not self._gone:
                    await self.receive()

    async def close(self, code: int, reason: str = "") -> None:
        if self._open:
            self._open = False
            await self._send({"type": "websocket.close", "code": code, "reason": reason})

    def cut(self, problem: Problem) -> None:
        """A gate refuses the client now: close, whatever the endpoint does."""
        _keep(asyncio.get_running_loop().create_task(self.close(REFUSED, problem.code)))


def connection_class(path: RequestPath, served: Mapping[str, Served]) -> type:
    """The class Quart makes for each handshake; `served` maps paths to endpoints with their services filled in."""

    class SocketASGI:
        def __init__(self, app: Any, scope: Any) -> None:
            self.scope = scope

        async def __call__(self, receive: Any, send: Any) -> None:
            await receive()  # websocket.connect
            scope = self.scope
            peer = scope.get("client") or ("",)
            headers = dict(scope["headers"])
            forwarded = headers.get(b"x-forwarded-for")
            client_ip = path.client(peer[0], forwarded.decode("latin1") if forwarded is not None else None)
            connection = Connection(scope, receive, send, client_ip, path.callers.meters)
            try:
                found = _admit(path, served, connection, headers.get(b"host"))
            except Problem as problem:
                await connection.refuse(problem)
            else:
                with path.lasting.hold(client_ip, scope["path"], connection.cut):
                    await _serve(found, connection, path.record)

    return SocketASGI


def _admit(path: RequestPath, served: Mapping[str, Served], connection: Connection, host: bytes | None) -> Served:
    """The endpoint of a handshake, after the checks that every request meets; raises the problem that refuses it."""
    url_path, client_ip = connection.request.path, connection.request.client_ip
    found = served.get(url_path.rstrip("/"))
    if found is None:
        raise NotFound("No socket is served here.")
    if path.draining:
        raise Unavailable("The server is shutting down.", code="shutting_down")
    if not path.hosts(host):
        raise Malformed("The Host header names another host.", code="invalid_host")
    for gate in path.gates:
        gate.check(client_ip, "GET", url_path)
    if SIGN_IN.isdisjoint({*connection.query, *connection.request.headers}):
        connection.count_anonymous()
    if not found.loaded.serves:
        raise out_of_service(found.loaded)
    return found


async def _serve(found: Served, connection: Connection, record: Callable[..., None]) -> None:
    try:
        await found.serve(connection)
    except ConnectionError:
        log.debug("a socket's client left")
    except Exception as error:
        path, told = connection.request.path, {"plugin": found.loaded.name, "request_id": connection.request.request_id}
        log.exception("a socket endpoint raised", extra=told)
        record(found.loaded.name, f"WS {path}", error, connection.request.request_id)
        await connection.close(1011)
    await connection.drain(LINGER_SECONDS)
    # the server closes the connection once this returns, but must not be left waiting for somebody to read
    _keep(asyncio.get_running_loop().create_task(connection.drain(DRAIN_SECONDS)))


def _keep(task: asyncio.Task[None]) -> None:
    """The loop itself holds tasks weakly."""
    _draining.add(task)
    task.add_done_callback(_draining.discard)
