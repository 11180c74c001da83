"""Streams whose client takes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from tests.plugins.realtime.conftest import hub_of, settle

from corral.testing.kit import Client, Kit


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
        async with asyncio.timeout(20):
            while not hub.dropped:
                await writer.post("/emitter", {"count": 100, "size": 3000})
                await asyncio.sleep(0.01)
        async with asyncio.timeout(3):
            while hub.viewers:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.02)


async def test_a_sign_out_ends_a_stream_that_nobody_reads(kit: Kit, port: int) -> None:
    slow, writer, hub = await kit.as_user(), await kit.as_user(), hub_of(kit)
    async with deaf_stream(port, slow):
        async with asyncio.timeout(20):
            while not any(len(viewer.queue) > 50 for viewer in hub.viewers):
                await writer.post("/emitter", {"count": 100, "size": 3000})
                await settle(kit)
        assert (await slow.post("/auth/logout")).status == 204
        async with asyncio.timeout(2.5):
            while hub.viewers:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.02)
