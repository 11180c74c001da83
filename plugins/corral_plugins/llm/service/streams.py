"""Reads streamed responses from providers, and removes credentials from requests and responses.

Timeouts limit the duration of each stream. The chunks are normalised and redacted, even if a credential is split across
chunks, and the last chunk contains the token usage.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from corral.auth.principal import Principal
from corral.redact.redactor import Redactor, RedactorStream, redacting_machine_text
from corral_plugins.llm.api import ProviderConnection, ProviderError
from corral_plugins.llm.service.calls import CallOutcome
from corral_plugins.llm.service.registry import ModelTarget
from corral_plugins.llm.service.responses import (
    TEXT_FIELDS,
    convert_provider_errors,
    normalize_completion,
    time_limit,
    timed_out,
)

INLINE_TOKENS = 16_000  # longer texts are redacted in a thread
Context = Callable[[], contextlib.AbstractContextManager[None]]


def attribute_request_text(by: Principal) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that attributes redacted text to the caller's task, which generated the text.

    Text from a user's request is not attributed, because no machine generated it.
    """
    return contextlib.nullcontext() if by.task_id is None else redacting_machine_text("task", by.task_id)


def attribute_response_text(by: Principal, provider: str) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that attributes redacted text to the caller's task, or else to the provider."""
    return (
        redacting_machine_text("llm_provider", provider)
        if by.task_id is None
        else redacting_machine_text("task", by.task_id)
    )


async def redact_value(redactor: Redactor, value: Any, tokens: int) -> Any:
    """Return a copy of the value without stored credentials. Images are not text and stay unchanged."""
    if tokens > INLINE_TOKENS:
        return await asyncio.to_thread(_redact_texts, redactor, value)
    return _redact_texts(redactor, value)


def _redact_texts(redactor: Redactor, value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("type") == "image_url":
            return value
        redacted = {name: _redact_texts(redactor, item) for name, item in value.items()}
        if "logprobs" in value and redacted.get("message") != value.get("message"):
            redacted["logprobs"] = None  # log probabilities spell out the redacted text
        return redacted
    if isinstance(value, list):
        return [_redact_texts(redactor, item) for item in value]
    return redactor.redact(value, patterns=False) if isinstance(value, str) else value


class StreamRedaction:
    """Redacts the chunks of one stream.

    Each text field and the arguments of each tool call are redacted as separate streams. `context` is a function that
    returns the context manager in which redaction runs.
    """

    def __init__(self, redactor: Redactor, context: Context = contextlib.nullcontext) -> None:
        self._redactor, self._context = redactor, context
        self._streams: dict[tuple[int, str | int], RedactorStream] = {}
        self._last_chunk: dict[str, Any] = {}  # the template of chunks with text that was held back

    def redact_chunk(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Redact a chunk, and yield the chunks that may be sent now.

        If the chunk ends a choice, the yielded chunks also contain the text that was held back for this choice.
        """
        self._last_chunk = chunk
        for choice in chunk.get("choices") or ():
            index, delta = choice.get("index", 0), choice.get("delta") or {}
            with self._context():
                is_changed = self._redact_delta(index, delta)
            if is_changed:
                choice.pop("logprobs", None)  # log probabilities spell out redacted and held-back text
            if choice.get("finish_reason") is not None:
                choice["finish_reason"] = self._redactor.redact(choice["finish_reason"], patterns=False)
            if choice.get("finish_reason") is not None and (rest := self._held_back(index)):
                if delta:
                    yield {**chunk, "choices": [{**choice, "finish_reason": None}], "usage": None}
                yield {**chunk, "choices": [{"index": index, "delta": rest, "finish_reason": None}], "usage": None}
                choice["delta"] = {}
                choice.pop("logprobs", None)
        yield chunk

    def flush_held_back(self) -> Iterator[dict[str, Any]]:
        """Yield the text that is still held back for choices that had not finished when the stream ended or failed."""
        for index in sorted({key[0] for key in self._streams}):
            if rest := self._held_back(index):
                yield {**self._last_chunk, "choices": [{"index": index, "delta": rest, "finish_reason": None}]}

    def _redact_delta(self, index: int, delta: dict[str, Any]) -> bool:
        """Redact a delta in place. Return whether one of its strings changed."""
        is_changed = False
        for name, value in delta.items():
            if name in TEXT_FIELDS and isinstance(value, str):
                delta[name] = self._stream_of_part(index, name).feed(value)
                is_changed |= value != delta[name]
            elif name != "tool_calls":
                delta[name] = self._redactor.redact_json(value, patterns=False)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            for part, field in ((call, "id"), (function, "name")):
                if isinstance(part.get(field), str):
                    part[field] = self._redactor.redact(part[field], patterns=False)
            if isinstance(function.get("arguments"), str):
                stream = self._stream_of_part(index, call.get("index", 0))
                function["arguments"] = stream.feed(function["arguments"])
        return is_changed

    def _held_back(self, index: int) -> dict[str, Any]:
        """End the redaction of a choice, and return its held-back text as a delta."""
        delta: dict[str, Any] = {}
        for key in [key for key in self._streams if key[0] == index]:
            with self._context():
                text = self._streams.pop(key).end()
            if text and isinstance(key[1], str):
                delta[key[1]] = text
            elif text:
                delta.setdefault("tool_calls", []).append({"index": key[1], "function": {"arguments": text}})
        return delta

    def _stream_of_part(self, index: int, part: str | int) -> RedactorStream:
        stream = self._streams.get((index, part))
        if stream is None:
            stream = self._streams[(index, part)] = self._redactor.stream(patterns=False)
        return stream


# -- streams


Chunk = dict[str, Any]


async def open_stream(
    target: ModelTarget, request: dict[str, Any], connection: ProviderConnection
) -> tuple[AsyncGenerator[Chunk, None], Chunk]:
    """Return the provider's stream and its first chunk. After the first chunk, no fallback is possible."""
    iterator = target.provider.kind.stream(request, connection)
    try:
        async with time_limit(target.name, connection.timeouts.first_token_seconds, "no first token"):
            chunk = await _next_chunk(target, iterator)
    except BaseException:
        await iterator.aclose()
        raise
    if chunk is None:
        raise ProviderError(502, "The stream ended before its first chunk.", billable=True)
    return iterator, chunk


async def relay_stream(
    target: ModelTarget,
    iterator: AsyncGenerator[Chunk, None],
    first: Chunk,
    redaction: StreamRedaction,
    outcome: CallOutcome,
) -> AsyncGenerator[Chunk, None]:
    """Yield the redacted chunks for the caller, and update `outcome` with each chunk.

    Only the last chunk contains the token usage.
    """
    last: Chunk = first

    async def received() -> AsyncIterator[Chunk]:
        yield first
        async for chunk in _remaining_chunks(target, iterator):
            yield chunk

    async with contextlib.aclosing(iterator):
        async for chunk in received():
            chunk["model"] = target.name
            outcome.add_chunk(chunk)
            last = {**chunk, "choices": []}
            if not chunk["choices"]:
                continue
            chunk.pop("usage", None)
            for redacted in redaction.redact_chunk(chunk):
                yield redacted
    for redacted in redaction.flush_held_back():
        yield redacted
    yield {**last, "usage": outcome.usage()}


async def _remaining_chunks(target: ModelTarget, iterator: AsyncGenerator[Chunk, None]) -> AsyncIterator[Chunk]:
    """Yield the chunks after the first one.

    Each chunk must arrive within `idle_seconds`, and the whole response within `total_seconds`.
    """
    timeouts, loop = target.provider.connection.timeouts, asyncio.get_running_loop()
    deadline = loop.time() + timeouts.total_seconds
    while True:
        seconds = min(timeouts.idle_seconds, deadline - loop.time())
        try:
            async with asyncio.timeout(seconds) as scope:
                chunk = await _next_chunk(target, iterator)
        except TimeoutError:
            if not scope.expired():
                raise
            if seconds < timeouts.idle_seconds:
                raise timed_out(target.name, timeouts.total_seconds, "no end of the response") from None
            raise timed_out(target.name, seconds, "no further token") from None
        if chunk is None:
            return
        yield chunk


async def _next_chunk(target: ModelTarget, iterator: AsyncGenerator[Chunk, None]) -> Chunk | None:
    """Return the next normalised chunk, or None at the end of the stream."""
    with convert_provider_errors(target.provider.name):
        chunk = await anext(iterator, None)
        return None if chunk is None else normalize_completion(chunk)


class AssembledMessage:
    """Assembles a whole message from chunks for storage."""

    def __init__(self) -> None:
        self._text = ""
        self._tool_calls: dict[int, dict[str, str]] = {}

    def add_chunk(self, chunk: Mapping[str, Any]) -> None:
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
