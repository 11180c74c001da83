"""Hypercorn's WebSockets, with an end for messages that are too large and for peers that are gone (docs/adr/0017)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any

from hypercorn.protocol import h2, h11
from hypercorn.protocol.events import Body, Data, EndData, Event, StreamClosed
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from hypercorn.typing import WebsocketAcceptEvent
from wsproto.events import CloseConnection, Message, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

CLOSING_SECONDS = 2.0  # bytes that nobody reads would reset the connection, and lose the code of the close
MISSED_PINGS = 2.5  # so long without a byte, counted in intervals of pings, and the peer is gone


class ByteBuffer(WebsocketBuffer):
    """Counts bytes, of text too."""

    def extend(self, event: Message[Any]) -> None:
        if isinstance(event, TextMessage):
            self.length += len(event.data.encode()) - len(event.data)
        super().extend(event)


class SocketStream(WSStream):
    """No extension is offered: what a compressed message inflates to is known when it is in memory."""

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
        elif self.closed and not self._over.is_set():  # refused by Hypercorn, which would leave the connection open
            await self.send(StreamClosed(stream_id=self.stream_id))

    async def _accept(self, message: WebsocketAcceptEvent) -> None:
        self.handshake.extensions = None
        await super()._accept(message)

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            if isinstance(event, Message):
                await self._take(event)
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                await self._send_wsproto_event(event.response())
                self.task_group.spawn(self._end)

    async def _take(self, event: Message[Any]) -> None:
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
        """End the connection, when the peer has done so or has had the time to."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._over.wait()
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_SECONDS):
                await self.send(EndData(stream_id=self.stream_id))  # over HTTP/2 what waits is sent first
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _send_pings(self) -> None:
        interval = self.config.websocket_ping_interval or math.inf
        while time.monotonic() - self._heard < MISSED_PINGS * interval:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._send_wsproto_event(Ping())  # waits as long as the peer reads nothing
                    await self._over.wait()
                    return
        await self._end()


def install() -> None:
    """Have the connections of this process use it."""
    h11.WSStream = h2.WSStream = SocketStream  # type: ignore[assignment,attr-defined]
