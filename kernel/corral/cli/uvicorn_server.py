"""Serves with uvicorn and httptools, and adds limits that uvicorn itself does not enforce (docs/adr/0018)."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection

from corral.cli import asgi_servers
from corral.config.model import Config


class Http1(HttpToolsProtocol):
    """An HTTP/1 connection that limits the size and the duration of a request head. httptools limits neither.

    `_unparsed` counts the bytes received since the last complete head, body part or message. It grows only within a
    head, a chunk extension or a trailer, so only these are limited.
    """

    _unparsed = 0
    _heads = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        timer = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self.timeout_keep_alive_task = timer

    def data_received(self, data: bytes) -> None:
        # uvicorn stops the idle timer at the first byte. Here only a complete head does: a partial head counts as idle.
        timer, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        heads = self._heads
        self._unparsed += len(data)
        super().data_received(data)
        if timer is not None:
            if self._heads == heads and self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = timer
            else:
                timer.cancel()
        if self._unparsed > asgi_servers.HEADER_LIMIT and not self.transport.is_closing():
            self._refuse_head()

    def _refuse_head(self) -> None:
        if self._heads == 0 or self.cycle.response_complete:
            self.transport.write(STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._heads += 1
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

    uvicorn's own class closes the connection without a close code. If the client is gone, it also raises an error that
    is not a `ConnectionError`.
    """

    async def send(self, message: Any) -> None:
        try:
            await super().send(message)
        except ClientDisconnected as gone:
            raise ConnectionResetError("the client is gone") from gone

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
