"""How the servers tell the application whether a part of the body of a request has arrived, and who may believe it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from corral.asgi.request import RECEIVED
from corral.config.model import Config
from corral.testing.kit import Kit
from corral.testing.server import serving_app

pytestmark = pytest.mark.one_engine

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers whether the body had arrived before it was read, and whether anything arrived after it."""
    if scope["type"] != "http":
        return
    is_received = scope["extensions"][RECEIVED]
    before, more, body = is_received(), True, b""
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    answer = f"{before} {is_received()} {body.decode()}".encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.mark.parametrize(("parts", "had_arrived"), [([HEAD + b"ab"], True), ([HEAD, b"a", b"b"], False)])
async def test_a_server_tells_whether_the_body_has_arrived(
    server_name: str, parts: list[bytes], had_arrived: bool
) -> None:
    async with serving_app(app, Config(), server_name) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # the second request uses the same connection
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.1)  # the server receives each part by itself
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
            assert body.decode() == f"{had_arrived} False ab"
        writer.close()


async def test_a_body_that_does_not_arrive_through_quart_is_a_timeout(make_kit: Callable[..., Any]) -> None:
    """Quart collects the body, so it may be incomplete although a part of it waits in the server."""
    kit: Kit = await make_kit(plugins=[], config={"server.fast_dispatch": False, "server.body_timeout_seconds": 1})
    parts, sent = [{"type": "http.request", "body": b"{", "more_body": True}], []
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", b"2")]

    ended = asyncio.Event()

    async def receive() -> Any:
        if parts:
            return parts.pop()
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("more_body") is False:
            ended.set()

    scope = {
        "type": "http",
        "http_version": "1.1",
        "asgi": {"version": "3.0"},
        "method": "POST",
        "scheme": "http",
        "path": "/api/v1/auth/login",
        "raw_path": b"/api/v1/auth/login",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 4000),
        "server": ("127.0.0.1", 80),
        "extensions": {RECEIVED: lambda: True},
    }
    app: Any = kit.application.app
    await app(scope, receive, send)
    assert sent[0]["status"] == 408, sent
