"""Streams whose client takes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from tests.limits import within
from tests.plugins.realtime.conftest import hub_of, settle

from corral.testing.kit import Client, Kit

pytestmark = pytest.mark.one_engine


@contextlib.asynccontextmanager
async def deaf_stream(port: int, who: Client) -> AsyncIterator[None]:
    """An SSE client that reads nothing."""
    loop = asyncio.get_running_loop()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await loop.sock_connect(deaf, ("127.0.0.1", port))
        head = f"GET /api/v1/events/stream HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {who.token}\r\n\r\n"
        await loop.sock_sendall(deaf, head.encode())
        yield


async def test_a_stream_that_nobody_reads_is_let_go(kit: Kit, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_plugins.realtime.service.viewer.CLOSE_SECONDS", 0.5)
    writer, hub = await kit.as_user(), hub_of(kit)
    async with deaf_stream(port, await kit.as_user()):
        async with asyncio.timeout(60):
            while not hub.dropped:
                await writer.post("/emitter", {"count": 100, "size": 3000})
                await asyncio.sleep(0.01)
        async with within(3):
            while hub.viewers:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.02)


async def test_a_sign_out_ends_a_stream_that_nobody_reads(kit: Kit, port: int) -> None:
    slow, writer, hub = await kit.as_user(), await kit.as_user(), hub_of(kit)
    async with deaf_stream(port, slow):
        async with asyncio.timeout(60):
            while not any(len(viewer.queue) > 50 for viewer in hub.viewers):
                await writer.post("/emitter", {"count": 100, "size": 3000})
                await settle(kit)
        assert (await slow.post("/auth/logout")).status == 204
        async with within(2.5):
            while hub.viewers:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def deaf_socket(port: int, who: Client) -> AsyncIterator[None]:
    """A WebSocket client that subscribes, and then neither reads nor answers pings."""
    loop = asyncio.get_running_loop()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await loop.sock_connect(deaf, ("127.0.0.1", port))
        head = (
            "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Authorization: Bearer {who.token}\r\n\r\n"
        )
        await loop.sock_sendall(deaf, head.encode())
        assert b" 101 " in await loop.sock_recv(deaf, 20)
        message = b'{"type":"subscribe","event":"emitter.*"}'
        await loop.sock_sendall(deaf, bytes([0x81, 0x80 | len(message), 0, 0, 0, 0]) + message)
        yield


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.cli.asgi_servers.PING_SECONDS", 1.5)
    monkeypatch.setattr("corral.cli.listener.UNREAD_SECONDS", 2)
    monkeypatch.setattr("corral_plugins.realtime.service.viewer.UNREAD_MS", 200)


@pytest.mark.parametrize("events", [400, 4000], ids=["cut by the pings", "cut by the queue"])
async def test_sockets_that_nobody_reads_are_counted_with_one_line_each(
    quick_pings: None,
    kit: Kit,
    port: int,
    events: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fewer events than the queue holds, so that the pings end them, and more."""
    monkeypatch.setattr("corral_plugins.realtime.service.viewer.CLOSE_SECONDS", 0.5)
    slow, writer, hub = await kit.as_user(), await kit.as_user(), hub_of(kit)
    async with contextlib.AsyncExitStack() as sockets:
        for _ in range(3):
            await sockets.enter_async_context(deaf_socket(port, slow))
        async with asyncio.timeout(60):
            while sum(len(viewer.subscriptions) for viewer in hub.viewers) < 3:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.02)
        for _ in range(events // 100):
            await writer.post("/emitter", {"count": 100, "size": 20_000})
        async with asyncio.timeout(60):
            while hub.viewers:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.02)
    assert hub.dropped > 3
    told = [record for record in caplog.records if record.message.endswith("its client does not read")]
    assert len(told) == 3
    assert sum(vars(record)["dropped"] for record in told) == hub.dropped
    assert [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"] == []
