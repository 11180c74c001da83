"""`/ws` and other sockets, on the raw ASGI messages: no task, queue or context beside the endpoint's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from corral.asgi.app import Sender
from corral.asgi.call import Call
from corral.asgi.closed import out_of_service
from corral.asgi.endpoint import MAX_PARAMETERS
from corral.asgi.path import RequestPath, problem_reply
from corral.errors import Malformed, NotFound, Problem, Unavailable
from corral.http.answers import Request
from corral.plugin import Meter
from corral.plugins.record import PluginRecord

log = logging.getLogger("corral.http")

SIGN_IN = frozenset({"token", "ticket", "authorization", "x-api-key"})  # in the query, in headers
REFUSED = 4403
LINGER_SECONDS, DRAIN_SECONDS = 0.25, 5.0
_draining: set[asyncio.Task[None]] = set()


class Served(NamedTuple):
    """An endpoint with its services filled in, and its plugin. Of a plugin that is down the latter is enough."""

    loaded: PluginRecord
    serve: Callable[..., Any] = out_of_service


class Connection:
    """Implements `corral.http.sockets.SocketConnection`."""

    def __init__(self, call: Call, send: Any, sender: Sender, meters: Iterable[Meter]) -> None:
        self._call, self._send, self._sender, self._meters = call, send, sender, meters
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in call.scope["headers"]}
        self.request = Request("GET", call.path, call.client_ip, call.request_id, headers)
        self.query: dict[str, str] = {}
        self._open, self._gone = False, False

    def count_anonymous(self) -> None:
        for meter in self._meters:
            meter.arrive(self.request.client_ip, None, anonymous=True)

    async def accept(self) -> None:
        await self._send({"type": "websocket.accept", "headers": []})
        self._open = True

    async def refuse(self, problem: Problem) -> None:
        if "websocket.http.response" not in (self._call.scope.get("extensions") or {}):
            await self._send({"type": "websocket.close", "code": 1008})
            return
        reply = problem_reply(problem, self._call)
        headers = self._sender.headers(reply, self._call)
        await self._send({"type": "websocket.http.response.start", "status": reply.status, "headers": headers})
        await self._send({"type": "websocket.http.response.body", "body": reply.body})

    async def receive(self) -> str | bytes | None:
        message = await self._call.receive()
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


def connection_class(path: RequestPath, served: Mapping[str, Served], sender: Sender) -> type:
    """The class Quart makes for each handshake; `served` maps paths to endpoints with their services filled in."""

    class SocketASGI:
        def __init__(self, app: Any, scope: Any) -> None:
            self.scope = scope

        async def __call__(self, receive: Any, send: Any) -> None:
            await receive()  # websocket.connect
            call = Call({**self.scope, "method": "GET"}, receive, 0.0)
            call.client_ip = path.client(call.scope)
            connection = Connection(call, send, sender, path.callers.meters)
            try:
                found = _admit(path, served, connection, call)
            except Problem as problem:
                problem.detail = path.redactor.redact(problem.detail)
                await connection.refuse(problem)
            else:
                with path.lasting.hold(call.client_ip, call.path, connection.cut):
                    await _serve(found, connection, path.record)

    return SocketASGI


def _admit(path: RequestPath, served: Mapping[str, Served], connection: Connection, call: Call) -> Served:
    """The endpoint of a handshake, after the checks that every request meets; raises the problem that refuses it."""
    found = served.get(call.path.rstrip("/"))
    if found is None:
        raise NotFound("No socket is served here.")
    if path.draining:
        raise Unavailable("The server is shutting down.", code="shutting_down")
    if not path.hosts(call.headers.get(b"host")):
        raise Malformed("The Host header names another host.", code="invalid_host")
    for gate in path.gates:
        gate.check(call.client_ip, "GET", call.path)
    try:
        connection.query |= parse_qsl(call.query.decode("latin1"), max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise Malformed(f"The query string has more than {MAX_PARAMETERS} parameters.") from None
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
