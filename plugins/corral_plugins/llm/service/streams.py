"""An answer from the provider to the caller: time limits of it and its chunks, redaction, usage at its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from typing import Any

from corral_plugins.llm.api import Connection, ProviderError
from corral_plugins.llm.service.answers import completion, failures_of
from corral_plugins.llm.service.failures import timed_out
from corral_plugins.llm.service.outcome import Outcome
from corral_plugins.llm.service.redaction import StreamRedaction
from corral_plugins.llm.service.registry import Target

Chunk = dict[str, Any]


async def in_time(target: Target, call: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """A whole answer, within the provider's `total_seconds`."""
    patience = target.provider.connection.timeouts.total_seconds
    try:
        async with asyncio.timeout(patience) as scope:
            return await call
    except TimeoutError:
        if not scope.expired():
            raise
        raise timed_out(target.name, patience, "no answer") from None


async def first_chunk(
    target: Target, request: dict[str, Any], connection: Connection
) -> tuple[AsyncGenerator[Chunk, None], Chunk]:
    """The provider's stream and its first chunk, after which nothing falls back."""
    iterator = target.provider.kind.stream(request, connection)
    patience = connection.timeouts.first_token_seconds
    try:
        async with asyncio.timeout(patience) as scope:
            chunk = await _next(target, iterator)
    except TimeoutError:
        await iterator.aclose()
        if not scope.expired():
            raise
        raise timed_out(target.name, patience, "no first token") from None
    except BaseException:
        await iterator.aclose()
        raise
    if chunk is None:
        raise ProviderError(502, "The stream ended before it began.", reached=True)
    return iterator, chunk


async def _next(target: Target, iterator: AsyncGenerator[Chunk, None]) -> Chunk | None:
    """The next chunk in OpenAI's shape; None: there is none."""
    with failures_of(target.provider.name):
        chunk = await anext(iterator, None)
        return None if chunk is None else completion(chunk)


async def following(target: Target, iterator: AsyncGenerator[Chunk, None]) -> AsyncIterator[Chunk]:
    """The other chunks, each within the provider's `idle_seconds`, all within its `total_seconds`."""
    timeouts, loop = target.provider.connection.timeouts, asyncio.get_running_loop()
    until = loop.time() + timeouts.total_seconds
    while True:
        patience = min(timeouts.idle_seconds, until - loop.time())
        try:
            async with asyncio.timeout(patience) as scope:
                chunk = await _next(target, iterator)
        except TimeoutError:
            if not scope.expired():
                raise
            if patience < timeouts.idle_seconds:
                raise timed_out(target.name, timeouts.total_seconds, "no end of the answer") from None
            raise timed_out(target.name, patience, "no further token") from None
        if chunk is None:
            return
        yield chunk


async def relayed(
    target: Target,
    iterator: AsyncGenerator[Chunk, None],
    first: Chunk,
    redaction: StreamRedaction,
    outcome: Outcome,
) -> AsyncGenerator[Chunk, None]:
    """Chunks as the caller gets them; the last one alone has usage. `outcome` is told of each."""
    last: Chunk = first

    async def incoming() -> AsyncIterator[Chunk]:
        yield first
        async for chunk in following(target, iterator):
            yield chunk

    async with contextlib.aclosing(iterator):
        async for chunk in incoming():
            chunk["model"] = target.name
            outcome.note_chunk(chunk)
            last = {**chunk, "choices": []}
            if not chunk["choices"]:
                continue
            chunk.pop("usage", None)
            for ready in redaction.feed(chunk):
                yield ready
    for ready in redaction.end():
        yield ready
    yield {**last, "usage": outcome.usage()}


class Answer:
    """A whole answer, put together of chunks, to be kept."""

    def __init__(self) -> None:
        self.text = ""
        self.tool_calls: dict[int, dict[str, str]] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """One chunk more."""
        for choice in chunk["choices"]:
            delta = choice.get("delta", {})
            self.text += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                kept = self.tool_calls.setdefault(call["index"], {"name": "", "arguments": ""})
                for name in kept:
                    kept[name] += call["function"].get(name, "")

    def message(self) -> dict[str, Any]:
        """As a message of the assistant."""
        calls = [{"function": call} for _, call in sorted(self.tool_calls.items())]
        return {"role": "assistant", "content": self.text, **({"tool_calls": calls} if calls else {})}
