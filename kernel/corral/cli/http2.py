"""Hypercorn's HTTP/2, where one stream must harm neither the others nor its own answer (docs/adr/0016), and the ways
to it.
"""

from __future__ import annotations

import contextlib
from typing import Any

from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h11 import Request
from hypercorn import protocol
from hypercorn.events import Closed, Event
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol


class Http2(H2Protocol):
    """An answer that comes before the end of its request, or breaks off, ends its stream and nothing else."""

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, Closed):  # who waits for room in a buffer would wait for ever
            for buffer in tuple(self.stream_buffers.values()):
                await buffer.close()

    async def stream_send(self, event: StreamEvent) -> None:
        await super().stream_send(event)
        if isinstance(event, StreamClosed):
            await self._part_with(event.stream_id)

    async def _send_data(self, stream_id: int) -> None:
        await super()._send_data(stream_id)
        if stream_id not in self.streams:
            await self._part_with(stream_id)

    async def _part_with(self, stream_id: int) -> None:
        """Nobody serves the stream any more: what still comes of its request has no reader."""
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None:
            await self._reset(stream_id, ErrorCodes.NO_ERROR)
        elif not buffer._complete:  # the answer breaks off, and the client must not wait for the rest
            await self._reset(stream_id, ErrorCodes.INTERNAL_ERROR)
            await buffer.close()
            self.priority.unblock(stream_id)
            await self.has_data.set()  # the sending task forgets it

    async def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        stream = self.connection.streams.get(stream_id)
        if stream is not None and stream.open and not self.closed:
            with contextlib.suppress(ProtocolError):  # the connection is at its end
                self.connection.reset_stream(stream_id, code)
                await self._flush()

    async def _create_stream(self, request: Any) -> None:
        await super()._create_stream(request)
        self.keep_alive_requests = 0  # at its limit the connection would end, with all that others are being answered


class Http1(H11Protocol):
    """HTTP/2 is spoken from the first byte, or as TLS agreed. `Upgrade: h2c` is not taken: a proxy that passes it
    on, as those do that let WebSockets through, would see nothing of the requests that follow, nor write their
    `X-Forwarded-For`. Of a body whose length is told in two ways a proxy may see another end.
    """

    async def _check_protocol(self, event: Request) -> None:
        if event.http_version == b"2.0":
            await super()._check_protocol(event)

    async def _create_stream(self, request: Request) -> None:
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            await self._send_error_response(400)
            await self.send(Closed())
            return
        await super()._create_stream(request)


def install() -> None:
    """Have the connections of this process use it."""
    protocol.H2Protocol = Http2  # type: ignore[attr-defined]
    protocol.H11Protocol = Http1  # type: ignore[attr-defined]
