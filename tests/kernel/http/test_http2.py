"""HTTP/2 by prior knowledge, on one connection: bodies that nothing announces, and streams that end early."""

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
import pytest

from corral.testing.kit import Kit

SHORT_TIMEOUT = pytest.mark.parametrize("probe", [{"server.body_timeout_seconds": 1}], indirect=True)


class Peer:
    """A client, frame by frame. `window`: how much of each answer the server may send."""

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

    async def hear(self, stream: int, *kinds: type[h2.events.Event], seconds: float = 5.0) -> Any:
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
        sent = 0
        with contextlib.suppress(h2.exceptions.ProtocolError):
            while sent < size:
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


async def token(probe: Kit) -> str:
    return (await probe.as_user()).token or ""


async def test_a_body_that_nothing_announces_is_read_to_its_end(probe: Kit, port: int) -> None:
    key = await token(probe)
    async with peer(port) as client:
        status, made = await client.answer(client.ask("POST", "/api/v1/probe/things", key, b'{"title":', b'"one"}'))
        assert (status, made["title"]) == (201, "one")
        path = f"/api/v1/probe/things/{made['id']}"
        assert (await client.answer(client.ask("PATCH", path, key, b'{"title":"two"}')))[0] == 200
        assert (await client.answer(client.ask("GET", path, key)))[1]["title"] == "two"
        assert (await client.answer(client.ask("POST", "/api/v1/probe/things", key)))[0] == 422
        status, refused = await client.answer(client.ask("GET", path, key, b'{"title":"three"}'))
        assert (status, refused["code"]) == (422, "validation_error")


async def test_t1_a_body_over_the_cap_is_413_and_the_connection_serves_on(probe: Kit, port: int) -> None:
    key = await token(probe)
    async with peer(port) as client:
        stream = client.ask("POST", "/api/v1/probe/echo", key, b"{", ends=False)
        await client.pour(stream, 3_000_000)
        assert (await client.answer(stream))[1]["code"] == "payload_too_large"
        assert (await client.answer(client.ask("GET", "/health", None)))[0] == 200


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/health"])
async def test_an_answer_before_the_end_of_its_request_harms_no_other_stream(port: int, path: str) -> None:
    async with peer(port) as client:
        early = client.ask("POST", path, None, b"[", ends=False)
        assert (await client.answer(early))[0] in (404, 405)
        assert (await client.hear(early, h2.events.StreamReset)).error_code == 0
        assert await client.pour(early, 1_000_000) < 1_000_000
        many = client.ask("GET", path, None, *[b" "] * 50, ends=False)
        assert (await client.answer(client.ask("GET", "/health", None)))[0] == 200
        await client.pour(many, 3_000_000)
        assert (await client.answer(many))[0] in (404, 413)
        assert (await client.answer(client.ask("GET", "/health", None)))[0] == 200


@SHORT_TIMEOUT
async def test_t9_a_body_without_progress_is_408(probe: Kit, port: int) -> None:
    async with peer(port) as client:
        stream = client.ask("POST", "/api/v1/probe/things", await token(probe), b'{"title":', ends=False)
        assert (await client.answer(stream))[1]["code"] == "request_timeout"


async def test_a_connection_serves_as_long_as_it_is_used(port: int) -> None:
    async with peer(port) as client:
        for _ in range(22):
            streams = [client.ask("GET", "/health", None) for _ in range(50)]
            assert {(await client.answer(stream))[0] for stream in streams} == {200}


async def test_nothing_is_left_of_a_client_that_takes_no_answer_and_leaves(probe: Kit, port: int) -> None:
    key, before = await token(probe), len(asyncio.all_tasks())
    body = json.dumps({"title": "big", "data": {"text": "x" * 60_000}}).encode()
    async with peer(port, window=0) as client:
        stream = client.ask(
            "POST", "/api/v1/probe/echo", key, *(body[at : at + 16_000] for at in range(0, 64_000, 16_000))
        )
        assert dict((await client.hear(stream, h2.events.ResponseReceived)).headers)[":status"] == "200"
        await asyncio.sleep(0.2)
        assert len(asyncio.all_tasks()) > before
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0.05)
