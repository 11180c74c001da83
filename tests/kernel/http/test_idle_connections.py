"""Idle connections are closed in time, and the end of the server waits for requests only."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
from hypercorn.protocol.h11 import H11Protocol
from tests.limits import within

from corral.cli import asgi_servers
from corral.config.model import Config
from corral.testing.server import serving_app

PATIENCE = 1.0
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * PATIENCE)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Served:
    def __init__(self, port: int, ending: asgi_servers.Shutdown) -> None:
        self.port, self.ending = port, ending

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


@pytest.fixture
async def served(server_name: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(asgi_servers, "KEEP_ALIVE_SECONDS", PATIENCE)
    async with serving_app(app, Config(), server_name) as (port, ending):
        await asyncio.sleep(0.1)
        yield Served(port, ending)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes = REQUEST) -> bytes:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(2) == b"ok"
    return head


async def ends(reader: asyncio.StreamReader) -> float:
    """Seconds until the server closes the connection."""
    began = time.monotonic()
    async with asyncio.timeout(60):
        while await reader.read(1000):
            continue
    return time.monotonic() - began


def watching() -> int:
    return sum("IdleTimer._watch" in repr(task) for task in asyncio.all_tasks())


async def test_it_is_closed_when_nothing_comes(served: Served) -> None:
    silent, _ = await served.connect()
    partial, writer = await served.connect()
    writer.write(b"GET / HTT")
    assert await ends(silent) > 0.8 * PATIENCE
    async with within(PATIENCE):
        await ends(partial)
    assert watching() == 0


async def test_requests_keep_it_and_a_long_one_is_no_silence(served: Served) -> None:
    reader, writer = await served.connect()
    for _ in range(4):
        await ask(reader, writer)
        await asyncio.sleep(PATIENCE / 3)
    await ask(reader, writer, REQUEST.replace(b"/ ", b"/slow "))
    assert await ends(reader) > 0.8 * PATIENCE


async def test_nothing_is_left_of_those_that_are_closed(served: Served) -> None:
    for _ in range(20):
        reader, writer = await served.connect()
        assert b"close" in await ask(reader, writer, REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        async with within(0.8 * PATIENCE):
            await ends(reader)
    assert watching() == 0
    reader, writer = await served.connect()
    await ask(reader, writer)
    writer.close()
    async with asyncio.timeout(60):
        while watching():  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("server_name", ["hypercorn"])
async def test_a_connection_is_let_go_when_its_client_closes_it(served: Served) -> None:
    def connections() -> int:
        return sum(isinstance(item, H11Protocol) for item in gc.get_objects())

    descriptors = psutil.Process().num_fds()
    gc.collect()
    gc.disable()
    try:
        before = connections()
        for _ in range(10):
            reader, writer = await served.connect()
            await ask(reader, writer)
            writer.close()
            await writer.wait_closed()
        async with within(0.8 * PATIENCE):
            while psutil.Process().num_fds() > descriptors or connections() != before:  # noqa: ASYNC110
                await asyncio.sleep(PATIENCE / 4)
        assert psutil.Process().num_fds() <= descriptors
        assert connections() == before
    finally:
        gc.enable()


async def test_the_end_of_the_server_waits_for_requests_and_not_for_silence(served: Served) -> None:
    idle, writer = await served.connect()
    await ask(idle, writer)
    busy, other = await served.connect()
    other.write(REQUEST.replace(b"/ ", b"/slow "))
    await asyncio.sleep(0.1)
    served.ending.close(served.ending.seconds)
    async with within(0.8 * PATIENCE):
        await ends(idle)
    assert b"200" in await busy.readuntil(b"\r\n\r\n")
    with contextlib.suppress(asyncio.IncompleteReadError):
        await busy.readexactly(2)
    async with within(PATIENCE):
        await ends(busy)
