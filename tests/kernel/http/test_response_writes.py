"""How the servers write responses: at once if sent as one message, and otherwise as soon as a part is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from corral.asgi.request import WHOLE_RESPONSE
from corral.auth.principal import PUBLIC
from corral.config.model import Config
from corral.http.answers import Text
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral.testing.server import serving_app

pytestmark = pytest.mark.one_engine

LENGTH = (b"content-length", b"2")
PAUSE = 0.2
LAST = {"GET": (b"ok", b"0\r\n\r\n", b"Error"), "HEAD": (b"\r\n\r\n",)}  # the ends of responses


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    _, path, kind = scope["path"].split("/")
    headers = [LENGTH] if path == "whole" else []
    if kind == "injected":
        headers.append((b"x-name", b"a\r\nset-cookie: b"))
    if kind == "named":
        headers += [(b"x-name", b"a"), (b"connection", b"close"), (b"x-name", b"b")]
    if path == "whole" and kind != "parts":
        assert WHOLE_RESPONSE in scope["extensions"]
        await send({"type": WHOLE_RESPONSE, "status": 200, "headers": headers, "body": b"ok"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await asyncio.sleep(PAUSE)
    for body in (b"o", b"k") if kind == "parts" else (b"ok",):
        await send({"type": "http.response.body", "body": body, "more_body": body == b"o"})


async def parts_of_response(server: str, path: str, method: str = "GET") -> list[bytes]:
    """The response, as it arrives piece by piece."""
    async with serving_app(app, Config(), server) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        parts: list[bytes] = []
        while not b"".join(parts).endswith(LAST[method]) and (part := await reader.read(65536)):
            parts.append(part)
        writer.close()
        return parts


async def test_a_response_in_one_message_is_one_write(server_name: str) -> None:
    (whole,) = await parts_of_response(server_name, "/whole/now")
    head, _, body = whole.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert (head.count(b"content-length: 2"), head.count(b"\r\ndate: "), body) == (1, 1, b"ok")


async def test_the_head_of_a_stream_does_not_wait(server_name: str) -> None:
    first, *_ = await parts_of_response(server_name, "/stream/late")
    assert first.endswith(b"\r\n\r\n")
    assert b"ok" not in first


async def test_a_body_in_parts_of_known_length(server_name: str) -> None:
    whole = b"".join(await parts_of_response(server_name, "/whole/parts"))
    assert whole.startswith(b"HTTP/1.1 200 ")
    assert whole.endswith(b"\r\n\r\nok")


async def test_the_response_to_head_has_no_body(server_name: str) -> None:
    whole = b"".join(await parts_of_response(server_name, "/whole/now", "HEAD"))
    assert whole.count(b"content-length: 2") == 1
    assert whole.endswith(b"\r\n\r\n")


async def test_a_header_with_a_line_break_is_never_sent(server_name: str) -> None:
    whole = b"".join(await parts_of_response(server_name, "/whole/injected"))
    assert whole.startswith(b"HTTP/1.1 500 ") or (server_name == "uvicorn" and not whole)  # it closes the connection
    assert b"set-cookie" not in whole


async def test_every_header_of_a_response_is_sent_once(server_name: str) -> None:
    whole = b"".join(await parts_of_response(server_name, "/whole/named"))
    head, _, body = whole.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    names = [line.partition(b": ")[0].lower() for line in lines]
    assert status.startswith(b"HTTP/1.1 200 ")
    assert (sorted(names), body) == ([b"connection", b"content-length", b"date", b"x-name", b"x-name"], b"ok")


routes = Routes("/lengths", tag="Lengths")


@routes.get("/wrong", needs=PUBLIC)
def get_wrong_length() -> Text:
    """Return a text with another length than it has."""
    return Text("ok", "text/plain", {"Content-Length": "1"})


class LengthsPlugin(Plugin):
    """Lengths: responses that tell their lengths."""

    name = "lengths"

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]


async def test_no_header_of_a_handler_contradicts_the_length_of_the_body(
    server_name: str, make_kit: Callable[..., Any]
) -> None:
    kit = await make_kit(plugins=[LengthsPlugin])
    async with serving_app(kit.application.app, kit.kernel.config, server_name) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # the second response begins where the first one ends
            writer.write(b"GET /api/v1/lengths/wrong HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert head.count(b"content-length: 2\r\n") == 1
            assert await reader.readexactly(2) == b"ok"
        writer.close()
