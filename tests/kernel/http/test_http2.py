"""HTTP/2 by prior knowledge, on one connection: bodies that nothing announces, and streams that end early."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import h2.errors
import h2.events
import pytest
from hypercorn.asyncio import serve
from hypercorn.config import Config
from tests.kernel.http.http2_peer import peer

from corral.cli import asgi_servers, hypercorn_server
from corral.cli.listener import listen
from corral.testing.kit import Kit
from corral.testing.server import serving

pytestmark = pytest.mark.one_engine

SHORT_TIMEOUT = pytest.mark.parametrize("probe", [{"server.body_timeout_seconds": 1}], indirect=True)


@pytest.fixture
async def port(probe: Kit) -> AsyncIterator[int]:
    """The probe served by Hypercorn: uvicorn has no HTTP/2."""
    async with serving(probe, "hypercorn") as number:
        yield number


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


async def test_a_client_that_resets_many_streams_is_disconnected(probe: Kit, port: int) -> None:
    async with peer(port) as client:
        for _ in range(100):  # a page that is left cancels its requests
            client.connection.reset_stream(client.ask("GET", "/health", None))
        client.flush()
        assert (await client.answer(client.ask("GET", "/health", None)))[0] == 200
    served = probe.kernel.metrics.requests.total()
    async with peer(port) as client:
        for _ in range(2000):
            client.connection.reset_stream(client.ask("GET", "/health", None))
        client.flush()
        goaway = await client.hear(0, h2.events.ConnectionTerminated)
        assert goaway.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
        async with asyncio.timeout(60):
            while not client.reader.at_eof():  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.01)
    assert probe.kernel.metrics.requests.total() <= served + 200


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


def server_tasks() -> set[asyncio.Task[Any]]:
    """Return the tasks that run code of the HTTP server or of the request pipeline."""
    codes = [(task, getattr(task.get_coro(), "cr_code", None)) for task in asyncio.all_tasks()]
    names = [(task, code.co_filename) for task, code in codes if code is not None]
    return {task for task, name in names if "hypercorn" in name or "/corral/asgi/" in name}


@pytest.fixture
def brief_idle_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that neither sends nor takes anything is closed after a second."""
    monkeypatch.setattr(asgi_servers, "KEEP_ALIVE_SECONDS", 1)


async def test_nothing_is_left_of_a_client_that_takes_no_answer_and_leaves(
    brief_idle_period: None, probe: Kit, port: int
) -> None:
    key = await token(probe)
    async with peer(port) as client:  # once the server has answered, it has begun all tasks of its own
        assert (await client.answer(client.ask("GET", "/health", None)))[0] == 200
    before = server_tasks()
    body = json.dumps({"title": "big", "data": {"text": "x" * 60_000}}).encode()
    async with peer(port, window=0) as client:
        stream = client.ask(
            "POST", "/api/v1/probe/echo", key, *(body[at : at + 16_000] for at in range(0, 64_000, 16_000))
        )
        assert dict((await client.hear(stream, h2.events.ResponseReceived)).headers)[":status"] == "200"
        begun = server_tasks() - before
        assert begun
    async with asyncio.timeout(60):
        while begun & server_tasks():  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0.02)


async def test_an_answer_that_breaks_off_ends_its_stream_alone() -> None:
    async def breaks_off(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        if scope["path"] == "/whole":
            await send({"type": "http.response.body", "body": b"2"})

    hypercorn_server.patch_hypercorn()
    listener, ending, config = listen("127.0.0.1:0"), asyncio.Event(), Config()
    config.bind, config.errorlog = [f"fd://{os.dup(listener.fileno())}"], None
    running = asyncio.create_task(serve(breaks_off, config, shutdown_trigger=ending.wait))
    async with peer(listener.getsockname()[1]) as client:
        for _ in range(3):
            assert (await client.hear(client.ask("GET", "/", None), h2.events.StreamReset)).error_code == 2
            assert await client.answer(client.ask("GET", "/whole", None)) == (200, 12)
    ending.set()
    await running
    listener.close()
