"""Reads streams from providers: applies timeouts, normalizes and redacts chunks, and appends the usage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from corral_plugins.llm.api import Connection, ProviderError
from corral_plugins.llm.service.calls import Outcome
from corral_plugins.llm.service.redaction import StreamRedaction
from corral_plugins.llm.service.registry import Target
from corral_plugins.llm.service.responses import errors_of, normalize_completion, time_limit, timed_out

Chunk = dict[str, Any]


async def open_stream(
    target: Target, request: dict[str, Any], connection: Connection
) -> tuple[AsyncGenerator[Chunk, None], Chunk]:
    """Return the provider's stream and its first chunk. No fallback takes place after the first chunk."""
    iterator = target.provider.kind.stream(request, connection)
    try:
        async with time_limit(target.name, connection.timeouts.first_token_seconds, "no first token"):
            chunk = await _next(target, iterator)
    except BaseException:
        await iterator.aclose()
        raise
    if chunk is None:
        raise ProviderError(502, "The stream ended before its first chunk.", billable=True)
    return iterator, chunk


async def relay(
    target: Target,
    iterator: AsyncGenerator[Chunk, None],
    first: Chunk,
    redaction: StreamRedaction,
    outcome: Outcome,
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks for the caller, with usage only in the last one. Updates `outcome` with each chunk."""
    last: Chunk = first

    async def received() -> AsyncIterator[Chunk]:
        yield first
        async for chunk in _remaining(target, iterator):
            yield chunk

    async with contextlib.aclosing(iterator):
        async for chunk in received():
            chunk["model"] = target.name
            outcome.add_chunk(chunk)
            last = {**chunk, "choices": []}
            if not chunk["choices"]:
                continue
            chunk.pop("usage", None)
            for redacted in redaction.feed(chunk):
                yield redacted
    for redacted in redaction.end():
        yield redacted
    yield {**last, "usage": outcome.usage()}


async def _remaining(target: Target, iterator: AsyncGenerator[Chunk, None]) -> AsyncIterator[Chunk]:
    """Yield the chunks after the first one, each within `idle_seconds` and all within `total_seconds`."""
    timeouts, loop = target.provider.connection.timeouts, asyncio.get_running_loop()
    deadline = loop.time() + timeouts.total_seconds
    while True:
        seconds = min(timeouts.idle_seconds, deadline - loop.time())
        try:
            async with asyncio.timeout(seconds) as scope:
                chunk = await _next(target, iterator)
        except TimeoutError:
            if not scope.expired():
                raise
            if seconds < timeouts.idle_seconds:
                raise timed_out(target.name, timeouts.total_seconds, "no end of the response") from None
            raise timed_out(target.name, seconds, "no further token") from None
        if chunk is None:
            return
        yield chunk


async def _next(target: Target, iterator: AsyncGenerator[Chunk, None]) -> Chunk | None:
    """Return the next normalized chunk, or None at the end of the stream."""
    with errors_of(target.provider.name):
        chunk = await anext(iterator, None)
        return None if chunk is None else normalize_completion(chunk)


class AssembledMessage:
    """Assembles a whole message from chunks, in order to store it."""

    def __init__(self) -> None:
        self._text = ""
        self._tool_calls: dict[int, dict[str, str]] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Append the text and the tool calls of a chunk."""
        for choice in chunk["choices"]:
            delta = choice.get("delta", {})
            self._text += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                function = self._tool_calls.setdefault(call["index"], {"name": "", "arguments": ""})
                for name in function:
                    function[name] += call["function"].get(name, "")

    def to_message(self) -> dict[str, Any]:
        """Return the assembled assistant message."""
        calls = [{"function": function} for _, function in sorted(self._tool_calls.items())]
        return {"role": "assistant", "content": self._text, **({"tool_calls": calls} if calls else {})}
