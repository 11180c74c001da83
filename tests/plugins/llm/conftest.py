"""A fake provider server on loopback with scripted behaviours, and Corral on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import pytest

from corral.testing.server import free_port
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.settings import TOTAL_TIMEOUT_SECONDS

KEY = "sk-upstream-9f8e7d6c5b4a3210"
"""The API key that the provider server is called with."""


class Request:
    """A request to the server."""

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers = method, path, headers
        self.body: Any = json.loads(body) if body else None


class Exchange:
    """A request and its response. `gone` is set if the client disconnects before the response is complete."""

    def __init__(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.request, self._reader, self._writer = request, reader, writer
        self.gone = asyncio.Event()
        self.gone_at = 0.0
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        with contextlib.suppress(ConnectionError):
            if not await self._reader.read(1):
                self.gone_at = time.monotonic()
                self.gone.set()

    async def json(self, body: Any, status: int = 200, **headers: str) -> None:
        """Respond with JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode() + data)
        await self._writer.drain()

    async def begin(self) -> None:
        """Begin a stream of server-sent events."""
        self._writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        await self._writer.drain()

    async def event(self, data: Any, name: str | None = None) -> None:
        """Send an event."""
        text = data if isinstance(data, str) else json.dumps(data)
        self._writer.write(f"{f'event: {name}{chr(10)}' if name else ''}data: {text}\n\n".encode())
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def close(self) -> None:
        """Complete the response."""
        self._watching.cancel()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


Behaviour = Callable[[Exchange], Awaitable[None]]


class Upstream:
    """A provider server. Each of `behaviours` responds to one request; then `otherwise` responds to all."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.behaviours: list[Behaviour] = []
        self.otherwise: Behaviour = says("hello from upstream")
        self.url = ""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Condition()

    @property
    def requests(self) -> list[Request]:
        """The requests, oldest first."""
        return [exchange.request for exchange in self.exchanges]

    async def asked(self, times: int = 1) -> None:
        """Return when the server has received this many requests."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.exchanges) >= times)

    async def start(self, port: int = 0) -> Self:
        """Listen on this port, or on a free one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def stop(self) -> None:
        """Stop the server, even with open connections."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        exchange = Exchange(Request(method, path, headers, body), reader, writer)
        async with self._news:
            self.exchanges.append(exchange)
            self._news.notify_all()
        behaviour = self.behaviours.pop(0) if self.behaviours else self.otherwise
        try:
            await behaviour(exchange)
        except asyncio.CancelledError:  # the test is over
            pass
        finally:
            await exchange.close()


def completion(text: str, **more: Any) -> dict[str, Any]:
    """A chat completion in OpenAI's format."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "served-1"}
    return {**head, "choices": [choice], "usage": usage, **more}


def chunk(text: str | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of a chat completion."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
USAGE = {
    "id": "c",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [],
    "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
}


def says(text: str, **more: Any) -> Behaviour:
    """Respond with a completion, streamed if the request asks for it."""

    async def behave(exchange: Exchange) -> None:
        if exchange.request.body and exchange.request.body.get("stream"):
            await streams(*text.split(" "))(exchange)
        else:
            await exchange.json(completion(text, **more))

    return behave


def streams(*words: str, pause: float = 0.0, end: bool = True) -> Behaviour:
    """Respond with a stream of these texts."""

    async def behave(exchange: Exchange) -> None:
        await exchange.begin()
        for word in words:
            await exchange.event(chunk(word))
            await asyncio.sleep(pause)
        if end:
            await exchange.event(chunk(None, "stop"))
            await exchange.event(USAGE)
            await exchange.event("[DONE]")

    return behave


def refuses(status: int, message: str = "no", **headers: str) -> Behaviour:
    """Respond with an error."""

    async def behave(exchange: Exchange) -> None:
        await exchange.json({"error": {"message": message, "type": "x"}}, status, **headers)

    return behave


async def hangs(exchange: Exchange) -> None:
    """Do not respond until the client disconnects."""
    await exchange.gone.wait()


def shorten(kit: Any, seconds: float) -> None:
    """Shorten the total timeout of calls: the minimum of the setting is too long for tests."""
    gateway = kit.kernel.container.get(Gateway)
    real = gateway._settings

    class Short:
        def get(self, setting: Any) -> Any:
            return seconds if setting is TOTAL_TIMEOUT_SECONDS else real.get(setting)

    gateway._settings = Short()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A running provider server."""
    server = await Upstream().start()
    yield server
    await server.stop()


@pytest.fixture
def providers(upstream: Upstream) -> dict[str, Any]:
    """`[plugins.llm.providers]` with one provider that calls the server, without retries."""
    return {
        "up": {
            "kind": "openai",
            "base_url": upstream.url,
            "api_key": KEY,
            "max_retries": 0,
            "models": [{"id": "m1", "context_window": 1000, "max_output_tokens": 500}, {"id": "m2"}],
        }
    }


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Any], Awaitable[str]]]:
    """`url = await serve(kit)`: Corral on a real socket."""
    from hypercorn.asyncio import serve as hypercorn_serve
    from hypercorn.config import Config

    async with contextlib.AsyncExitStack() as stack:

        async def start(kit: Any) -> str:
            config, port, ended = Config(), free_port(), asyncio.Event()
            config.bind, config.accesslog, config.graceful_timeout = [f"127.0.0.1:{port}"], None, 0.5
            task = asyncio.ensure_future(hypercorn_serve(kit.application.app, config, shutdown_trigger=ended.wait))
            stack.push_async_callback(asyncio.wait_for, asyncio.shield(task), 10)
            stack.callback(ended.set)
            while True:
                with contextlib.suppress(OSError):
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                assert not task.done(), task.exception()
                await asyncio.sleep(0.02)
            return f"http://127.0.0.1:{port}"

        yield start
