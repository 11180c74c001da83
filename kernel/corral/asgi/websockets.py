"""Implements WebSocket connections directly on ASGI messages, from the handshake to the frames.

A connection runs in the task of its endpoint and needs no further task, queue or context.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from corral.asgi.endpoint import MAX_PARAMETERS
from corral.asgi.pipeline import Pipeline
from corral.asgi.request import IncomingRequest
from corral.asgi.response import problem_response
from corral.asgi.unavailable import plugin_unavailable
from corral.errors import Malformed, NotFound, Problem, Unavailable
from corral.plugins.record import PluginRecord

log = logging.getLogger("corral.http")

REFUSED = 4403  # the close code if a gate refuses the client of an open connection
LINGER_SECONDS, DRAIN_SECONDS = 0.25, 5.0
_draining: set[asyncio.Task[None]] = set()


class SocketEndpoint(NamedTuple):
    """A WebSocket endpoint: the record of its plugin, and its `serve` function with all services bound.

    If the plugin is not running, the handshake is refused and `serve` is only a placeholder.
    """

    loaded: PluginRecord
    serve: Callable[..., Any] = plugin_unavailable


class Connection:
    """A WebSocket connection. Implements `corral.http.routes.SocketConnection`."""

    def __init__(self, request: IncomingRequest, send: Any, pipeline: Pipeline) -> None:
        self.request = request
        self._receive, self._send, self._pipeline = request.receive, send, pipeline
        self.query: dict[str, str] = {}
        self._open, self._gone = False, False

    def count_anonymous(self) -> None:
        self._pipeline.count_arrival(self.request, None, anonymous=True)

    async def accept(self) -> None:
        await self._send({"type": "websocket.accept", "headers": []})
        self._open = True

    async def refuse(self, problem: Problem) -> None:
        if "websocket.http.response" not in (self.request.scope.get("extensions") or {}):
            await self._send({"type": "websocket.close", "code": 1008})
            return
        response = problem_response(problem, self.request)
        headers = self._pipeline.sender.headers(response, self.request)
        await self._send({"type": "websocket.http.response.start", "status": response.status, "headers": headers})
        await self._send({"type": "websocket.http.response.body", "body": response.body})

    async def receive(self) -> str | bytes | None:
        message = await self._receive()
        if message["type"] != "websocket.receive":
            self._open, self._gone = False, True
            return None
        text: str | bytes | None = message.get("text")
        return text if text is not None else message.get("bytes")

    async def send(self, text: str) -> None:
        if not self._open:
            raise ConnectionError("the WebSocket is closed")
        await self._send({"type": "websocket.send", "text": text})

    async def discard_messages(self, seconds: float) -> None:
        """Read and discard messages for up to `seconds`, or until the client disconnects.

        If the server closed the connection before reading all data, the connection would be reset, and the client would
        lose the close code.
        """
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                while not self._gone:
                    await self.receive()

    async def close(self, code: int, reason: str = "") -> None:
        if self._open:
            self._open = False
            await self._send({"type": "websocket.close", "code": code, "reason": reason})

    def close_with_problem(self, problem: Problem) -> None:
        """Close the connection in a background task, because a gate now refuses the client."""
        _keep_reference(asyncio.get_running_loop().create_task(self.close(REFUSED, problem.code)))


def websocket_handler(pipeline: Pipeline, endpoints: Mapping[str, SocketEndpoint]) -> Callable[[Any, Any], Any]:
    """Return the function that Quart calls with the scope of each handshake.

    `endpoints` maps paths to endpoints.
    """

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        await receive()  # websocket.connect
        request = IncomingRequest(scope, receive, 0.0)
        connection = Connection(request, send, pipeline)
        try:
            endpoint = _admit(pipeline, endpoints, connection)
        except Problem as problem:
            problem.detail = pipeline.redactor.redact(problem.detail)
            await connection.refuse(problem)
        else:
            with pipeline.connections.register(request.client_ip, request.path, connection.close_with_problem):
                await _serve(endpoint, connection, pipeline.record_error)

    return lambda app, scope: functools.partial(handle, scope)


def _admit(pipeline: Pipeline, endpoints: Mapping[str, SocketEndpoint], connection: Connection) -> SocketEndpoint:
    """Apply the pipeline's checks to a handshake and return its endpoint. Raise a `Problem` to refuse the handshake."""
    request = connection.request
    endpoint = endpoints.get(request.path.rstrip("/"))
    if endpoint is None:
        raise NotFound("There is no WebSocket endpoint at this path.")
    if pipeline.draining:
        raise Unavailable("The server is shutting down.", code="shutting_down")
    pipeline.check_gates(request)
    request.refuse_repeated(b"authorization", b"x-api-key", b"origin")
    try:
        connection.query |= parse_qsl(request.query.decode("latin1"), max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise Malformed(f"The query string has more than {MAX_PARAMETERS} parameters.") from None
    if not request.has_credential and not connection.query.keys() & {"token", "ticket"}:
        connection.count_anonymous()
    if not endpoint.loaded.in_service:
        raise plugin_unavailable(endpoint.loaded)
    return endpoint


async def _serve(endpoint: SocketEndpoint, connection: Connection, record_error: Callable[..., None]) -> None:
    try:
        await endpoint.serve(connection)
    except ConnectionError:
        log.debug("WebSocket client disconnected")
    except Exception as error:
        request, plugin = connection.request, endpoint.loaded.name
        log.exception("socket endpoint failed", extra={"plugin": plugin, "request_id": request.request_id})
        record_error(plugin, f"WS {request.path}", error, request.request_id)
        await connection.close(1011)
    await connection.discard_messages(LINGER_SECONDS)
    # Returning closes the connection. The background task lets a client that reads late still receive the close frame.
    _keep_reference(asyncio.get_running_loop().create_task(connection.discard_messages(DRAIN_SECONDS)))


def _keep_reference(task: asyncio.Task[None]) -> None:
    """Keep a reference to the task until it is done, because the event loop holds only weak references to tasks."""
    _draining.add(task)
    task.add_done_callback(_draining.discard)
