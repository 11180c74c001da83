"""A client of HTTP/2, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings


class Peer:
    """`window`: how much of each answer the server may send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int = 65535) -> None:
        self.reader, self.writer = reader, writer
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="ascii"))
        self.connection.initiate_connection()
        self.connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.events: dict[int, list[h2.events.Event]] = defaultdict(list)
        self.flush()
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    def flush(self) -> None:
        self.writer.write(self.connection.data_to_send())

    async def _read(self) -> None:
        while data := await self.reader.read(65536):
            for event in self.connection.receive_data(data):
                self.events[getattr(event, "stream_id", None) or 0].append(event)
                if isinstance(event, h2.events.DataReceived):
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            self.flush()
            self._news.set()
        self._news.set()

    def ask(self, method: str, path: str, token: str | None, *parts: bytes, ends: bool = True) -> int:
        """Send a request without a Content-Length; the number of its stream."""
        stream = self.connection.get_next_available_stream_id()
        headers = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "localhost")]
        headers += [("authorization", f"Bearer {token}")] if token else []
        headers += [("content-type", "application/json")] if parts else []
        self.connection.send_headers(stream, headers, end_stream=ends and not parts)
        for number, part in enumerate(parts, 1):
            self.connection.send_data(stream, part, end_stream=ends and number == len(parts))
        self.flush()
        return stream

    def send(self, stream: int, data: bytes) -> None:
        """Send a part of a body, within the window."""
        for start in range(0, len(data), 16384):
            self.connection.send_data(stream, data[start : start + 16384])
        self.flush()

    def open_socket(self) -> int:
        """Ask for a WebSocket (RFC 8441); the number of its stream."""
        stream = self.connection.get_next_available_stream_id()
        headers = [(":method", "CONNECT"), (":protocol", "websocket"), (":path", "/"), (":scheme", "http")]
        self.connection.send_headers(stream, [*headers, (":authority", "localhost"), ("sec-websocket-version", "13")])
        self.flush()
        return stream

    async def hear(self, stream: int, *kinds: type[h2.events.Event], seconds: float = 60.0) -> Any:
        """The first event of one of these kinds on the stream."""
        async with asyncio.timeout(seconds):
            while True:
                for event in self.events[stream]:
                    if isinstance(event, kinds):
                        return event
                assert not self.reader.at_eof(), "the connection has ended"
                self._news.clear()
                await self._news.wait()

    async def answer(self, stream: int) -> tuple[int, Any]:
        """Status and document, when the answer is complete."""
        await self.hear(stream, h2.events.StreamEnded)
        head = await self.hear(stream, h2.events.ResponseReceived)
        body = b"".join(event.data for event in self.events[stream] if isinstance(event, h2.events.DataReceived))
        return int(dict(head.headers)[":status"]), json.loads(body) if body else None

    async def pour(self, stream: int, size: int) -> int:
        """Send so much of a body, as fast as the server takes it; how much was sent before it was not wanted."""
        sent, over = 0, (h2.events.StreamReset, h2.events.ConnectionTerminated)
        with contextlib.suppress(h2.exceptions.ProtocolError):
            # Once the window of a stream is used up, no frame is sent that could fail because the stream has ended.
            while sent < size and not any(isinstance(event, over) for event in self.events[stream] + self.events[0]):
                assert not self.reader.at_eof(), "the connection has ended"
                room = min(16384, self.connection.local_flow_control_window(stream))
                if room:
                    self.connection.send_data(stream, b" " * room)
                    self.flush()
                    sent += room
                await asyncio.sleep(0)
        return sent

    async def leave(self) -> None:
        self._reading.cancel()
        self.writer.close()


@contextlib.asynccontextmanager
async def peer(port: int, **options: Any) -> AsyncIterator[Peer]:
    made = Peer(*await asyncio.open_connection("127.0.0.1", port), **options)
    yield made
    await made.leave()
