"""Sends streamed responses, records streams that may have to be replayed, and disconnects blocked clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from corral.asgi.request import IncomingRequest, run_until_client_leaves
from corral.errors import Problem
from corral.plugin import Gate

CHECK_SECONDS = 1.0
MAX_RECORDED = 4 * 1024 * 1024


class LongLivedConnections:
    """The open WebSockets and streams of this process.

    The gates (checks that plugins contribute) are called repeatedly for each connection, because a client may be
    blocked while it is connected. One task does this for all connections; it runs only while connections are open.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = gates
        self._open: dict[object, tuple[str, str, Callable[[Problem], object]]] = {}
        self._checking: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def register(self, client_ip: str, path: str, end: Callable[[Problem], object]) -> Iterator[None]:
        """Keep a connection registered while the context is active.

        `end(problem)` is called if a gate refuses the client.
        """
        key = object()
        self._open[key] = client_ip, path, end
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check_all())
        try:
            yield
        finally:
            self._open.pop(key, None)

    async def _check_all(self) -> None:
        while self._open:
            await asyncio.sleep(CHECK_SECONDS)
            for key, (client_ip, path, end) in list(self._open.items()):
                try:
                    for gate in self._gates:
                        gate.check(client_ip, "GET", path)
                except Problem as problem:
                    if self._open.pop(key, None) is not None:
                        end(problem)


async def send_stream(
    chunks: Any, request: IncomingRequest, send: Callable[[Any], Awaitable[None]], connections: LongLivedConnections
) -> None:
    """Send chunks as they are produced. Stop early if the client disconnects or a gate refuses the client."""
    leaving = asyncio.ensure_future(request.disconnected())
    with connections.register(request.client_ip, request.path, lambda _: leaving.cancel()):
        await run_until_client_leaves(_send_chunks(chunks, send), leaving)


async def _send_chunks(chunks: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    async with contextlib.aclosing(chunks):  # runs the handler's clean-up at once, however the stream ends
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def record_stream(chunks: Any, ended: Callable[[bytes | None], Awaitable[None]]) -> AsyncIterator[bytes]:
    """Yield the chunks unchanged and record them.

    At the end, `ended` is called and awaited with all bytes, or with None if the stream was interrupted or exceeds
    `MAX_RECORDED` bytes.
    """
    parts: list[bytes] = []
    size, is_complete = 0, False
    try:
        async for chunk in chunks:
            size += len(chunk)
            if size <= MAX_RECORDED:
                parts.append(chunk)
            yield chunk
        is_complete = size <= MAX_RECORDED
    finally:
        await chunks.aclose()
        await ended(b"".join(parts) if is_complete else None)
