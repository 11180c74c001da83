"""Serves an ASGI application with Hypercorn.

Hypercorn's idle timer and its HTTP/1, HTTP/2 and WebSocket classes are replaced (docs/adr/0015, 0016 and 0017).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from wsgiref.handlers import format_date_time

import hypercorn.config
from h2.errors import ErrorCodes
from h2.events import StreamReset
from h2.exceptions import ProtocolError
from h11 import ERROR, EndOfMessage, LocalProtocolError, Request, Response
from h11 import Data as ResponseBody
from hypercorn import protocol
from hypercorn.asyncio import tcp_server
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.events import Closed, RawData
from hypercorn.events import Event as ConnectionEvent
from hypercorn.protocol import h2, h11
from hypercorn.protocol.events import Body, Data, EndData, Event, StreamClosed
from hypercorn.protocol.events import Response as ResponseHead
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from hypercorn.typing import LifespanState, WebsocketAcceptEvent
from hypercorn.utils import suppress_body, wrap_app
from wsproto.events import CloseConnection, Message, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

from corral.asgi.request import RECEIVED, WHOLE_RESPONSE
from corral.cli import asgi_servers
from corral.cli.listener import BACKLOG
from corral.config.model import Config

log = logging.getLogger("corral.http")

CLOSING_SECONDS = 2.0  # time to drain: unread bytes would reset the connection, and the close code would be lost
MAX_RESETS, RESETS_PER_SECOND = 100, 20  # streams that a client may reset on a connection: at once, and then
FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection"})  # headers of responses that h11 acts on
Header = tuple[bytes, bytes]
MISSED_PINGS = 2.5  # ping intervals without data after which a peer is considered gone


class IdleTimer:
    """Closes a connection that has been idle for too long. Replaces Hypercorn's timer `AsyncioSingleTask`.

    Each request postpones the deadline after which the connection counts as idle for too long. Hypercorn's own timer
    cancels and creates a task for every request, which accounts for a sixth of the time spent on a short request.
    """

    def __init__(self) -> None:
        self._deadline: float | None = None  # None while a request is processed
        self._watching: asyncio.Task[None] | None = None
        self._server: Any = None

    async def restart(self, task_group: Any, action: Callable[[], Any]) -> None:
        """Restart the timer of an idle connection.

        `action` is a bound method of the object that serves the connection.
        """
        if self._watching is None or self._watching.done():
            self._server = action.__self__  # type: ignore[attr-defined]  # a bound method
            self._watching = task_group._task_group.create_task(self._watch())
        server = self._server
        self._deadline = server.loop.time() + server.config.keep_alive_timeout

    async def stop(self) -> None:
        """Stop the timer until the next `restart`, because a request arrived or the connection was closed."""
        self._deadline = None
        if self._watching is not None and self._server.writer.is_closing():
            await self.end()

    async def end(self) -> None:
        """Stop the timer permanently, because the client will send no more requests."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait({watching})

    async def _watch(self) -> None:
        server = self._server
        terminated, patience = server.context.terminated, server.config.keep_alive_timeout
        while not server.reader.at_eof():
            due = self._deadline
            wait = patience if due is None else due - server.loop.time()
            if wait <= 0:
                break
            try:
                async with asyncio.timeout(wait):
                    await terminated.wait()
            except TimeoutError:
                continue
            if self._deadline is None:  # the connection closes after its current request
                return
            break
        if self._deadline is not None:
            await asyncio.shield(server._initiate_server_close())


class TcpConnection(tcp_server.TCPServer):
    """A connection whose memory is released as soon as the client has closed it.

    In Hypercorn, the idle timer keeps the connection in memory for the rest of the idle time, and then reference cycles
    keep its objects alive until a full garbage collection.

    If a client reads nothing for so long that the operating system drops the connection, the connection is treated as
    closed by the client. Hypercorn treats this case as an application error.
    """

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.end()  # type: ignore[attr-defined]  # an `IdleTimer`

    async def protocol_send(self, event: ConnectionEvent) -> None:
        try:
            await super().protocol_send(event)
        except OSError:
            await self.protocol.handle(Closed())

    async def _close(self) -> None:
        with contextlib.suppress(OSError):
            await super()._close()

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            vars(self).clear()


class Http2(H2Protocol):
    """An HTTP/2 connection that can reset a single stream without closing the connection.

    A stream is reset if its response is interrupted, or if its response ends before the request has been received. The
    class also limits how often the client may reset streams.
    """

    _resets = 0.0  # of the client, less what the time since has made up for
    _last_reset = 0.0

    async def _handle_events(self, events: list[Any]) -> None:
        """Serve the requests in the received data, or close the connection if the client resets too many streams.

        The server does the work for a request even if the client resets its stream immediately. Without a limit on
        resets, a client could cause an unlimited amount of work despite the limit on concurrent streams.
        """
        if resets := sum(isinstance(event, StreamReset) for event in events):
            now = time.monotonic()
            self._resets = max(0.0, self._resets - (now - self._last_reset) * RESETS_PER_SECOND) + resets
            self._last_reset = now
            if self._resets > MAX_RESETS:
                self.connection.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
                await self._flush()
                await self.send(Closed())
                return
        await super()._handle_events(events)

    async def handle(self, event: ConnectionEvent) -> None:
        await super().handle(event)
        if isinstance(event, Closed):  # wakes senders that wait for space in a buffer
            for buffer in tuple(self.stream_buffers.values()):
                await buffer.close()

    async def stream_send(self, event: Event) -> None:
        await super().stream_send(event)
        if isinstance(event, StreamClosed):
            await self._abandon(event.stream_id)

    async def _send_data(self, stream_id: int) -> None:
        await super()._send_data(stream_id)
        if stream_id not in self.streams:
            await self._abandon(stream_id)

    async def _abandon(self, stream_id: int) -> None:
        """Reset a stream, because the application no longer reads its request."""
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None:
            await self._reset(stream_id, ErrorCodes.NO_ERROR)
        elif not buffer._complete:  # the response is incomplete: the client must not wait for the rest
            await self._reset(stream_id, ErrorCodes.INTERNAL_ERROR)
            await buffer.close()
            self.priority.unblock(stream_id)
            await self.has_data.set()  # wakes the sending task, which removes the stream

    async def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        stream = self.connection.streams.get(stream_id)
        if stream is not None and stream.open and not self.closed:
            with contextlib.suppress(ProtocolError):  # the connection is closing
                self.connection.reset_stream(stream_id, code)
                await self._flush()

    async def _create_stream(self, request: Any) -> None:
        await super()._create_stream(request)
        self.keep_alive_requests = 0  # at its limit, Hypercorn would close the connection with all its streams


class WholeResponse(NamedTuple):
    """A response of known length that has a body."""

    status: int
    headers: list[Header]
    body: bytes


class RequestStream(HTTPStream):
    """An HTTP/1 request. The application may send the whole response as one message, which is written in one piece.

    Hypercorn's own class passes on the head, the body and the end separately.
    """

    async def app_send(self, message: Any) -> None:
        if message is None or message["type"] != WHOLE_RESPONSE:
            await super().app_send(message)
        elif not self._can_send_whole(message):
            for kind in ("http.response.start", "http.response.body"):
                part: Any = {**message, "type": kind}
                await super().app_send(part)
        else:
            self.state = ASGIHTTPState.CLOSED
            whole: Any = WholeResponse(message["status"], message["headers"], message["body"])
            try:
                await self.send(whole)
            except LocalProtocolError:  # the head is invalid, so nothing was sent: Hypercorn responds with 500
                self.state = ASGIHTTPState.REQUEST
                raise
            await self.send(StreamClosed(stream_id=self.stream_id))

    def _can_send_whole(self, message: Any) -> bool:
        has_body = bool(message["body"]) and not suppress_body(self.scope["method"], message["status"])
        return has_body and self.state is ASGIHTTPState.REQUEST


class RequestHead(NamedTuple):
    """The head of a request in the form in which Hypercorn reads it. The names of the headers are in lower case.

    Hypercorn iterates over all headers twice. With h11's header type, this takes five times as long as with a list.
    """

    method: bytes
    headers: list[Header]
    target: bytes
    http_version: bytes


class Http1(H11Protocol):
    """An HTTP/1 connection that ignores `Upgrade: h2c` and refuses `Content-Length` combined with `Transfer-Encoding`.

    If the length of a response body is known, the head and the body are written together. Hypercorn's own class writes
    three times, and each write is a system call and a packet. h11 is given only the response headers that it acts on,
    because it checks and copies each header several times.

    After an upgrade to `h2c`, a proxy that supports WebSockets forwards all further bytes without reading them, so it
    does not add `X-Forwarded-For` to the requests that these bytes contain. If a request contains both `Content-Length`
    and `Transfer-Encoding`, a proxy and Hypercorn may disagree about where its body ends.
    """

    _unsent = b""

    async def stream_send(self, event: Any) -> None:
        if isinstance(event, WholeResponse):
            head, lines = self._head(event.status, event.headers)
            await self._send_h11_event(head, ResponseBody(data=event.body), EndOfMessage(), lines=lines)
        elif isinstance(event, ResponseHead) and event.status_code >= 200:
            head, lines = self._head(event.status_code, event.headers)
            await self._send_h11_event(head, lines=lines)
        else:
            await super().stream_send(event)

    def _head(self, status: int, headers: Iterable[Header]) -> tuple[Response, bytes]:
        """Return the head of a response.

        The head consists of an h11 response with the headers that h11 acts on, and of all other headers as encoded
        lines.
        """
        headers = [*headers, *self.config.response_headers("h11")]
        if self.keep_alive_requests >= self.config.keep_alive_max_requests:
            headers.append((b"connection", b"close"))
        framing = [item for item in headers if item[0].lower() in FRAMING]
        lines = b"".join([b"%b: %b\r\n" % item for item in headers if item[0].lower() not in FRAMING])
        if lines.translate(None, asgi_servers.PRINTABLE) != b"\r\n" * (len(headers) - len(framing)):
            raise LocalProtocolError("A response header contains a control character.")
        return Response(headers=framing, status_code=status), lines

    async def _send_h11_event(self, event: Any, *following: Any, lines: bytes = b"") -> None:
        """Send the bytes that h11 produces for an event and for the events in `following`.

        `lines` contains further response headers as encoded lines.
        """
        try:
            data = self.connection.send(event) or b""
            if lines:
                data = b"%b%b\r\n" % (data[:-2], lines)
            for each in following:
                data += self.connection.send(each) or b""
        except LocalProtocolError:
            if self.connection.their_state is not ERROR:
                raise
            return
        self._unsent += data
        is_head = isinstance(event, Response) and not following
        waits_for_body = is_head and any(name == b"content-length" for name, _ in event.headers.raw_items())
        if self._unsent and not waits_for_body:
            data, self._unsent = self._unsent, b""
            await self.send(RawData(data=data))

    async def _check_protocol(self, event: Request) -> None:
        if event.http_version == b"2.0":
            await super()._check_protocol(event)

    async def _create_stream(self, request: Any) -> None:
        headers = [(name.lower(), value) for name, value in request.headers.raw_items()]
        if {b"content-length", b"transfer-encoding"} <= dict(headers).keys():
            await self._send_error_response(400)
            await self.send(Closed())
            return
        head: Any = RequestHead(request.method, headers, request.target, request.http_version)
        await super()._create_stream(head)
        stream: Any = self.stream
        if isinstance(self.stream, RequestStream):
            messages = stream.app_put.__self__  # a queue
            stream.scope["extensions"] |= {RECEIVED: lambda: not messages.empty(), WHOLE_RESPONSE: {}}


class ByteBuffer(WebsocketBuffer):
    """A buffer that limits the bytes in a message. Hypercorn's own buffer counts characters in text messages."""

    def extend(self, event: Message[Any]) -> None:
        if isinstance(event, TextMessage):
            self.length += len(event.data.encode()) - len(event.data)
        super().extend(event)


class SocketStream(WSStream):
    """A WebSocket stream that limits message sizes, detects disconnected peers, and always closes the connection.

    The stream accepts no WebSocket extensions such as compression, because the size of a compressed message is known
    only after it has been decompressed in memory.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.buffer = ByteBuffer(self.config.websocket_max_message_size)
        self._over = asyncio.Event()
        self._closing = False
        self._heard = time.monotonic()

    async def handle(self, event: Event) -> None:
        if isinstance(event, (Body, Data)):
            self._heard = time.monotonic()
        await super().handle(event)
        if isinstance(event, StreamClosed):
            self._over.set()
        elif self.closed and not self._over.is_set():  # Hypercorn refused the handshake
            await self.send(StreamClosed(stream_id=self.stream_id))

    async def _accept(self, message: WebsocketAcceptEvent) -> None:
        self.handshake.extensions = None
        await super()._accept(message)

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            if isinstance(event, Message):
                await self._receive_fragment(event)
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                await self._send_wsproto_event(event.response())
                self.task_group.spawn(self._end)

    async def _receive_fragment(self, event: Message[Any]) -> None:
        if self._closing:
            return
        try:
            self.buffer.extend(event)
        except FrameTooLargeError:
            self._closing = True
            self.buffer.clear()
            await self._send_wsproto_event(CloseConnection(code=CloseReason.MESSAGE_TOO_BIG))
            self.task_group.spawn(self._end, CLOSING_SECONDS)
        else:
            if event.message_finished:
                assert self.app_put is not None
                await self.app_put(self.buffer.to_message())
                self.buffer.clear()

    async def _end(self, patience: float = 0.0) -> None:
        """Wait up to `patience` seconds for the peer to close the connection, then close it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._over.wait()
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_SECONDS):
                await self.send(EndData(stream_id=self.stream_id))  # over HTTP/2, this sends queued data first
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _send_pings(self) -> None:
        interval = self.config.websocket_ping_interval or math.inf
        while time.monotonic() - self._heard < MISSED_PINGS * interval:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._send_wsproto_event(Ping())  # blocks while the peer reads nothing
                    await self._over.wait()
                    return
        await self._end()


def patch_hypercorn() -> None:
    """Replace Hypercorn's protocol, WebSocket and idle timer classes with the classes of this module.

    If the installed release of Hypercorn has no `AsyncioSingleTask`, its idle timer is not replaced.
    """
    protocol.H2Protocol = Http2  # type: ignore[attr-defined]
    protocol.H11Protocol = Http1  # type: ignore[attr-defined]
    h11.HTTPStream = RequestStream  # type: ignore[attr-defined]
    h11.WSStream = h2.WSStream = SocketStream  # type: ignore[assignment,attr-defined]
    if hasattr(tcp_server, "AsyncioSingleTask"):
        tcp_server.AsyncioSingleTask = IdleTimer
    else:
        log.info("Hypercorn's idle timer was not replaced, because this release has another one")


class HypercornConfig(hypercorn.config.Config):
    """The Hypercorn settings that Corral uses.

    With these settings, Hypercorn adds only the `Date` header to responses. The value of this header is formatted once
    per second.
    """

    made = (0, [(b"date", b"")])

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        second = int(time.time())
        if self.made[0] != second:
            self.made = (second, [(b"date", format_date_time(second).encode())])
        return self.made[1]


async def serve(config: Config, app: Any, accepting: int, shutdown: asgi_servers.Shutdown) -> None:
    """Serve `app` until `shutdown` closes the server.

    This function replaces Hypercorn's own, which cannot stop accepting connections before it closes the idle
    connections. `accepting` is the file descriptor of the listening socket; this function closes it.
    """
    patch_hypercorn()
    settings, loop, context = _settings(config), asyncio.get_running_loop(), WorkerContext(None)
    wrapped = wrap_app(app, settings.wsgi_max_body_size, "asgi")
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        task.add_done_callback(connections.discard)
        await TcpConnection(wrapped, loop, settings, context, LifespanState(), reader, writer)

    ssl = settings.create_ssl_context() if settings.ssl_enabled else None
    listening = await asyncio.start_server(
        connected,
        sock=socket.socket(fileno=accepting),
        backlog=BACKLOG,
        ssl=ssl,
        ssl_handshake_timeout=settings.ssl_handshake_timeout if ssl else None,
    )
    await shutdown.refusing.wait()
    listening.close()
    await shutdown.closing.wait()
    await context.terminated.set()
    if connections:
        _, late = await asyncio.wait(connections, timeout=shutdown.seconds)
        for connection in late:
            connection.cancel()


def _settings(config: Config) -> HypercornConfig:
    settings = HypercornConfig()
    settings.accesslog = None
    settings.errorlog = logging.getLogger("hypercorn.error")
    settings.h11_max_incomplete_size = asgi_servers.HEADER_LIMIT
    settings.keep_alive_timeout = asgi_servers.KEEP_ALIVE_SECONDS
    settings.websocket_max_message_size = asgi_servers.MESSAGE_LIMIT
    settings.websocket_ping_interval = asgi_servers.PING_SECONDS
    if config.server.certfile is not None and config.server.keyfile is not None:
        settings.certfile, settings.keyfile = str(config.server.certfile), str(config.server.keyfile)
    return settings
