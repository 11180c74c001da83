"""Sends streamed responses, and records streams that may have to be replayed under an idempotency key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from corral.asgi.long_lived_connections import LongLivedConnections
from corral.asgi.request import IncomingRequest

MAX_RECORDED = 4 * 1024 * 1024


async def send_stream(
    chunks: Any, request: IncomingRequest, send: Callable[[Any], Awaitable[None]], connections: LongLivedConnections
) -> None:
    """Send chunks as they are produced. Stops early if the client disconnects or a gate refuses the client."""
    sending = asyncio.ensure_future(_send_chunks(chunks, send))
    leaving = asyncio.ensure_future(request.disconnected())
    try:
        with connections.hold(request.client_ip, request.path, lambda _: leaving.cancel()):
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        sending.cancel()
        await asyncio.wait({sending})
    if not sending.cancelled():
        sending.result()


async def _send_chunks(chunks: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    try:
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await chunks.aclose()  # runs the handler's clean-up at once, however the stream ended


async def recorded(chunks: Any, ended: Callable[[bytes | None], Awaitable[None]]) -> AsyncIterator[bytes]:
    """Yield the chunks unchanged and record them.

    At the end, `ended` is awaited with all bytes, or with None if the stream was interrupted or exceeds
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
