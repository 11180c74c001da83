"""Serves an ASGI application with uvicorn and httptools, and enforces additional limits (docs/adr/0018).

Compared to uvicorn itself, responses need fewer system calls and connections need fewer timers (docs/adr/0019).
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Iterable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection

from corral.asgi.request import RECEIVED, WHOLE_RESPONSE
from corral.cli import asgi_servers
from corral.config.model import Config


class Response(RequestResponseCycle):
    """A response that the application may send as a single message, which is then written to the socket in one piece.

    uvicorn's own class writes the head and the body separately, and each write is a system call and a packet.
    """

    async def send(self, message: Any) -> None:
        if message["type"] != WHOLE_RESPONSE:
            await super().send(message)
        elif not self._write_at_once(message["status"], message["headers"], message["body"]):
            for kind in ("http.response.start", "http.response.body"):
                part: Any = {**message, "type": kind}
                await super().send(part)

    def _write_at_once(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write the whole response. Return False if uvicorn's own method must write or refuse it."""
        if self.scope["method"] == "HEAD" or self.disconnected or self.flow.write_paused or not self.keep_alive:
            return False
        headers = [*self.default_headers, *headers]
        lines = b"\r\n".join(map(b": ".join, headers))
        has_control_characters = lines.translate(None, asgi_servers.PRINTABLE) != b"\r\n" * (len(headers) - 1)
        if has_control_characters or b"\r\nconnection: " in lines:
            return False
        self.transport.write(b"%b%b\r\n\r\n%b" % (STATUS_LINE[status], lines, body))
        self.response_started = self.response_complete = True
        self.message_event.set()
        self.on_response()
        return True


class Http1(HttpToolsProtocol):
    """An HTTP/1 connection that limits the size and the duration of a request head. httptools limits neither.

    `_unparsed` counts the bytes received since the last complete head, body part or message. It grows only within a
    head, a chunk extension or a trailer, so only these are limited.

    A connection is idle until a complete head has arrived. It has a single timer, which checks `_idle_since`. The timer
    that uvicorn creates after each response accounts for more than 2 % of the time spent on a short request.
    """

    _unparsed = 0
    _idle_since: float | None = None  # None while a request is processed
    _timer: asyncio.TimerHandle

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_request()
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _wait_for_request(self) -> None:
        self._idle_since = self.loop.time()

    def _close_if_idle(self) -> None:
        now = self.loop.time()
        left = self.timeout_keep_alive - (now - self._idle_since if self._idle_since is not None else 0.0)
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._timer = self.loop.call_later(left, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self._timer.cancel()
        super().handle_websocket_upgrade()

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > asgi_servers.HEADER_LIMIT and not self.transport.is_closing():
            self._refuse_head()

    def _refuse_head(self) -> None:
        if getattr(self.cycle, "response_complete", True):  # uvicorn sets the cycle to None until the first request
            self.transport.write(STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        cycle.__class__ = Response
        cycle.scope["extensions"] = {RECEIVED: cycle.message_event.is_set, WHOLE_RESPONSE: {}}
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._wait_for_request()

    def on_headers_complete(self) -> None:
        self._unparsed, self._idle_since = 0, None
        super().on_headers_complete()
        self.headers = list(self.headers)  # trailers are added to the copy, so they do not reach the application

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore an unsupported `Upgrade` header, and close the connection after the response.

        uvicorn's own method logs a warning and leaves the connection open, but httptools drops all further bytes.
        """
        self.cycle.keep_alive = False


class WebSocket(WSProtocol):
    """A WebSocket connection that sends a close code after an invalid frame.

    uvicorn's own class closes the connection without a close code. If the client has disconnected, it also raises an
    error that is not a `ConnectionError`.
    """

    async def send(self, message: Any) -> None:
        try:
            await super().send(message)
        except ClientDisconnected as gone:
            raise ConnectionResetError("the client has disconnected") from gone

    def handle_close(self, event: CloseConnection) -> None:
        if self.conn.state is ConnectionState.OPEN:  # the peer has not closed: wsproto itself generated the event
            self.transport.write(self.conn.send(event))
        super().handle_close(event)


async def serve(config: Config, app: Any, accepting: int, shutdown: asgi_servers.Shutdown) -> None:
    """Serve `app` until `shutdown` closes the server.

    `accepting` is the file descriptor of the listening socket; uvicorn closes it.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a warning per malformed request would flood the log
    settings = uvicorn.Config(
        app,
        http=Http1,
        ws=WebSocket,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=asgi_servers.KEEP_ALIVE_SECONDS,
        ws_max_size=asgi_servers.MESSAGE_LIMIT,
        ws_per_message_deflate=False,
        ws_ping_interval=asgi_servers.PING_SECONDS,
        ws_ping_timeout=asgi_servers.PING_SECONDS,
        ssl_certfile=config.server.certfile,
        ssl_keyfile=config.server.keyfile,
    )
    server = uvicorn.Server(settings)

    async def end() -> None:
        await shutdown.refusing.wait()
        for listening in server.servers:
            listening.close()
        await shutdown.closing.wait()
        settings.timeout_graceful_shutdown = math.ceil(shutdown.seconds)
        server.should_exit = True

    ending = asyncio.create_task(end())
    try:
        await server._serve([socket.socket(fileno=accepting)])  # `serve` would install signal handlers
    finally:
        ending.cancel()
