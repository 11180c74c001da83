"""The connections to providers: each serves one request at a time and is used again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.plugins.llm.conftest import completion

from corral.config.reader import load
from corral.egress.client import Egress
from corral_plugins.llm.api import ProviderConnection, ProviderError
from corral_plugins.llm.providers import connections
from corral_plugins.llm.providers.http import ProviderHttp

pytestmark = pytest.mark.one_engine


class KeepAliveServer:
    """Answers each request on the connection on which it came, once `proceed` is set."""

    def __init__(self) -> None:
        self.opened = self.open = self.received = 0
        self.proceed, self._changed = asyncio.Event(), asyncio.Condition()
        self.port, self.head, self.text = 0, b"HTTP/1.1 200 OK\r\n", "hello"
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self._writers.append(writer)
        await self._change(opened=1, open=1)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
                await reader.readexactly(int(length))
                await self._change(received=1)
                await self.proceed.wait()
                body = msgspec.json.encode(completion(self.text))
                writer.write(self.head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        except (asyncio.IncompleteReadError, ConnectionError):  # one of both sides closed the connection
            await self._change(open=-1)
        finally:
            writer.close()

    async def hang_up(self) -> None:
        """Close all connections."""
        while self._writers:
            self._writers.pop().close()
        await self.until(lambda: self.open == 0)

    async def _change(self, **differences: int) -> None:
        async with self._changed:
            for name, difference in differences.items():
                setattr(self, name, getattr(self, name) + difference)
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds."""
        async with self._changed, asyncio.timeout(30):
            await self._changed.wait_for(condition)


@pytest.fixture
async def server() -> AsyncIterator[KeepAliveServer]:
    server = KeepAliveServer()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    yield server
    listener.close()


@pytest.fixture
async def client() -> AsyncIterator[ProviderHttp]:
    client = ProviderHttp()
    client.start(Egress(load({}, path=Path(os.devnull))))
    yield client
    await client.close()


def asking(client: ProviderHttp, server: KeepAliveServer, version: str = "1") -> asyncio.Future[Any]:
    url = f"http://127.0.0.1:{server.port}/v1"
    connection = ProviderConnection(name="up", base_url=url, operator=True, version=version)
    return asyncio.ensure_future(client.post_json(connection, f"{url}/chat/completions", {}, {"model": "m"}))


async def asked(client: ProviderHttp, server: KeepAliveServer, times: int) -> None:
    """Send so many requests at the same time."""
    server.proceed.clear()
    calls, received = [asking(client, server) for _ in range(times)], server.received
    await server.until(lambda: server.received == received + times)
    server.proceed.set()
    assert len(await asyncio.gather(*calls)) == times


async def test_connections_are_used_again(client: ProviderHttp, server: KeepAliveServer) -> None:
    for _ in range(3):
        await asked(client, server, 1)
    assert server.opened == 1
    for _ in range(3):
        await asked(client, server, 4)
    assert server.opened == 4
    await client.close()
    await server.until(lambda: server.open == 0)


async def test_a_changed_provider_gets_new_connections(client: ProviderHttp, server: KeepAliveServer) -> None:
    await asked(client, server, 2)
    server.proceed.clear()
    running = asking(client, server)
    await server.until(lambda: server.received == 3)
    changed = asking(client, server, version="2")
    await server.until(lambda: server.received == 4)
    assert server.opened == 3
    await server.until(lambda: server.open == 2)  # the idle one is closed, and the running call keeps its own
    server.proceed.set()
    assert (await running)["choices"] == (await changed)["choices"]
    await server.until(lambda: server.open == 1)


async def test_connections_that_are_idle_for_too_long_are_closed(
    client: ProviderHttp, server: KeepAliveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", -1.0)
    await asked(client, server, 3)
    await server.until(lambda: server.open == 0)
    await asked(client, server, 1)
    assert server.opened == 4


async def test_a_connection_that_the_server_has_closed_is_replaced(
    client: ProviderHttp, server: KeepAliveServer
) -> None:
    await asked(client, server, 2)
    await server.hang_up()
    await asked(client, server, 1)
    assert server.opened == 3


async def test_a_connection_of_a_call_that_was_cancelled_is_closed(
    client: ProviderHttp, server: KeepAliveServer
) -> None:
    call = asking(client, server)
    await server.until(lambda: server.received == 1)
    call.cancel()
    server.proceed.set()
    await server.until(lambda: server.open == 0)
    await asked(client, server, 1)
    assert server.opened == 2


@pytest.mark.parametrize(
    ("head", "limit", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n", 1000, "content encoding gzip"),
        (b"HTTP/1.1 200 OK\r\n", 10, "larger than 10 bytes"),
        (b"HTTP/2.7 OK\r\n", 1000, "sent no valid HTTP response (illegal status line)."),
    ],
)
async def test_a_response_that_cannot_be_read_is_an_error(
    client: ProviderHttp, server: KeepAliveServer, monkeypatch: pytest.MonkeyPatch, head: bytes, limit: int, said: str
) -> None:
    monkeypatch.setattr(connections, "MAX_RESPONSE_BYTES", limit)
    server.head = head
    with pytest.raises(ProviderError) as raised:
        await asked(client, server, 1)
    assert (raised.value.status, said in raised.value.message) == (502, True), raised.value.message
    await server.until(lambda: server.open == 0)


async def test_errors_of_connections_are_told_in_words(client: ProviderHttp) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello, I speak no TLS\r\n")
        await writer.drain()

    async def error_of(url: str) -> str:
        connection = ProviderConnection(name="up", base_url=url, operator=True)
        with pytest.raises(ProviderError) as raised:
            await client.post_json(connection, f"{url}/chat", {}, {})
        return raised.value.message

    other = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    assert await error_of(f"https://127.0.0.1:{port}/v1") == (
        f"127.0.0.1:{port} cannot be reached: the TLS handshake failed (wrong version number); check whether the "
        "server speaks TLS on this port."
    )
    other.close()
    assert await error_of("http://127.0.0.1:9/v1") == "127.0.0.1:9 cannot be reached: Connection refused."
