"""WebSockets: messages have a limit, and peers that are gone are noticed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import h2.events
import psutil
import pytest
from tests.kernel.http.http2_peer import Peer, peer
from tests.limits import within
from websockets.asyncio.client import ClientConnection, connect
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Event, TextMessage

from corral.cli import asgi_servers, listener
from corral.cli.asgi_servers import MESSAGE_LIMIT
from corral.config.model import Config
from corral.testing.server import serving_app

PING = 0.4


class Served:
    """An application that answers each message with its length, and remembers how its connections ended."""

    def __init__(self) -> None:
        self.port, self.ended = 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            leaving = asyncio.create_task(has_left(receive))
            while not leaving.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)
            return
        if scope["type"] != "websocket":
            return
        await receive()
        await send({"type": "websocket.accept", "headers": []})
        while (message := await receive())["type"] == "websocket.receive":
            if message["text"] == "leave":
                await send({"type": "websocket.close", "code": 4000})
                return
            await send({"type": "websocket.send", "text": str(len(message["text"]))})
        self.ended += 1

    def connect(self, **options: Any) -> connect:
        return connect(f"ws://127.0.0.1:{self.port}/", proxy=None, **options)


async def has_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


@pytest.fixture
async def served(server_name: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(listener, "UNREAD_SECONDS", 2)
    monkeypatch.setattr(asgi_servers, "PING_SECONDS", PING)
    app = Served()
    async with serving_app(app, Config(), server_name) as (app.port, _):
        yield app


async def shake(port: int, version: int = 13) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of our own: the head of the answer, and what to read and write with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        "GET / HTTP/1.1\nHost: localhost\nUpgrade: websocket\nConnection: Upgrade\n"
        f"Sec-WebSocket-Key: {key}\nSec-WebSocket-Version: {version}\n\n"
    )
    writer.write(head.replace("\n", "\r\n").encode())
    return await reader.readuntil(b"\r\n\r\n"), reader, writer


async def closes(one: ClientConnection) -> int | None:
    async with asyncio.timeout(60):
        await one.wait_closed()
    return one.close_code


def is_served(client: socket.socket) -> bool:
    """Whether the other end of the connection, in this process too, is open."""
    ours = client.getsockname()[1]
    others = [each.raddr for each in psutil.Process().net_connections("tcp")]  # empty for one that listens
    return any(getattr(other, "port", None) == ours for other in others)


def pinging() -> int:
    return sum("_send_pings" in repr(task) for task in asyncio.all_tasks())


async def test_bytes_count_and_a_larger_message_is_1009(served: Served) -> None:
    async with served.connect(compression=None) as one:
        for text in ("a" * MESSAGE_LIMIT, "é" * (MESSAGE_LIMIT // 2)):
            await one.send(text)
            assert await one.recv() == str(len(text))
        await one.send("é" * (MESSAGE_LIMIT // 2 + 1))
        assert await closes(one) == 1009
    async with served.connect(compression=None) as one:
        await one.send(["a" * 30_000] * 3)
        assert await closes(one) == 1009
    assert served.ended == 2


async def test_a_message_without_an_end_costs_no_memory_and_ends(served: Served) -> None:
    before, sent = psutil.Process().memory_info().rss, 0
    _, _, writer = await shake(served.port)
    writer.write(struct.pack("!BBQ", 0x81, 0x80 | 127, 1 << 40) + bytes(4))
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            while True:
                writer.write(b"a" * 65536)
                await writer.drain()
                sent += 65536
                await asyncio.sleep(0)
    assert psutil.Process().memory_info().rss - before < 32 * 2**20, sent
    assert served.ended == 1


async def test_nothing_is_inflated(served: Served) -> None:
    async with served.connect(compression="deflate") as one:
        assert one.protocol.extensions == []
        await one.send("a" * 1000)
        assert await one.recv() == "1000"


async def test_a_peer_that_is_silent_is_gone_within_three_pings(served: Served) -> None:
    async with served.connect(compression=None, ping_interval=None) as answers:
        _, reader, _ = await shake(served.port)
        began = time.monotonic()
        async with within(4 * PING):
            assert b"\x89" in await reader.read()
        assert time.monotonic() - began > 1.5 * PING
        assert served.ended == 1
        await answers.send("still here")
        assert await answers.recv() == "10"


async def test_nothing_is_left_of_a_socket_that_ended(served: Served) -> None:
    async with served.connect(compression=None) as one:
        assert pinging() <= 1
        await one.send("leave")
        assert await closes(one) == 4000
        async with asyncio.timeout(60):
            while pinging():  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.02)


async def test_a_refused_handshake_ends_the_connection(served: Served) -> None:
    head, reader, _ = await shake(served.port, version=12)
    assert head[9:12] in (b"400", b"426")
    async with asyncio.timeout(60):
        assert await reader.read() == b""


async def test_text_that_is_none_is_told(served: Served) -> None:
    _, reader, writer = await shake(served.port)
    writer.write(b"\x81\x81" + bytes(4) + b"\xff")
    async with asyncio.timeout(60):
        assert struct.pack("!H", 1007) in await reader.read()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such bound")
async def test_a_peer_that_takes_nothing_is_gone(served: Served) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await loop.sock_connect(deaf, ("127.0.0.1", served.port))
        await loop.sock_sendall(deaf, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.5)
        assert is_served(deaf)
        async with asyncio.timeout(60):
            while is_served(deaf):  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("server_name", ["hypercorn"])
@pytest.mark.parametrize("by", ["client", "application", "size"])
async def test_over_http2_the_code_of_the_close_arrives_and_other_streams_go_on(served: Served, by: str) -> None:
    async with peer(served.port) as client:
        streams = [client.open_socket(), client.open_socket()]
        ours, theirs = Connection(ConnectionType.CLIENT), Connection(ConnectionType.CLIENT)
        for stream in streams:
            assert dict((await client.hear(stream, h2.events.ResponseReceived)).headers)[":status"] == "200"
        said: dict[str, list[Event]] = {
            "client": [CloseConnection(code=1000)],
            "application": [TextMessage(data="leave")],
            "size": [TextMessage(data="é" * 20_000, message_finished=False)] * 2,
        }
        for each in said[by]:
            client.send(streams[0], ours.send(each))
            await asyncio.sleep(0.2)  # the window opens again
        closed = await frame(client, streams[0], ours, CloseConnection)
        assert closed.code == {"client": 1000, "application": 4000, "size": 1009}[by]
        if by == "size":
            client.send(streams[0], ours.send(closed.response()))
        await client.hear(streams[0], h2.events.StreamEnded)
        client.send(streams[1], theirs.send(TextMessage(data="still here")))
        assert (await frame(client, streams[1], theirs, TextMessage)).data == "10"


async def frame(client: Peer, stream: int, socket: Connection, kind: type[Any]) -> Any:
    """The first frame of this kind on the stream."""
    read = 0
    async with asyncio.timeout(60):
        while True:
            found = [each for each in client.events[stream] if isinstance(each, h2.events.DataReceived)]
            for each in found[read:]:
                socket.receive_data(each.data)
            read = len(found)
            for event in socket.events():
                if isinstance(event, kind):
                    return event
            await asyncio.sleep(0.01)
