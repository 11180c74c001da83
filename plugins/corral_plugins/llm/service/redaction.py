"""Credentials are taken out of what goes to a provider and of what comes back, also when chunks cut them in pieces."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from corral.auth.principal import Principal
from corral.redact.redactor import Redactor, RedactorStream, made_by
from corral_plugins.llm.service.answers import TEXTS

INLINE_TOKENS = 16_000  # more text than this is redacted in a thread
About = Callable[[], contextlib.AbstractContextManager[None]]


def asked_by(by: Principal) -> contextlib.AbstractContextManager[None]:
    """While a request is redacted: what a run asks was made by a machine, what people ask was not."""
    return contextlib.nullcontext() if by.task_id is None else made_by("task", by.task_id)


def answered_to(by: Principal, provider: str) -> contextlib.AbstractContextManager[None]:
    """While an answer is redacted: it is the remote side's."""
    return made_by("llm_provider", provider) if by.task_id is None else made_by("task", by.task_id)


async def redacted(redactor: Redactor, value: Any, tokens: int) -> Any:
    """A copy without stored credentials. Images are no text."""
    if tokens > INLINE_TOKENS:
        return await asyncio.to_thread(_without, redactor, value)
    return _without(redactor, value)


def _without(redactor: Redactor, value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("type") == "image_url":
            return value
        found = {name: _without(redactor, item) for name, item in value.items()}
        if "logprobs" in value and found.get("message") != value.get("message"):
            found["logprobs"] = None  # they spell what was taken out
        return found
    if isinstance(value, list):
        return [_without(redactor, item) for item in value]
    return redactor.redact(value, patterns=False) if isinstance(value, str) else value


class StreamRedaction:
    """Redacts the chunks of one stream. Each text of it, and each tool call's arguments, is a stream of its own.

    `about` is entered while it redacts: it says whose text it is.
    """

    def __init__(self, redactor: Redactor, about: About = contextlib.nullcontext) -> None:
        self._redactor, self._about = redactor, about
        self._streams: dict[tuple[int, str | int], RedactorStream] = {}
        self._newest: dict[str, Any] = {}  # chunk: what is let go later looks like it

    def feed(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What may be sent of it now; between a choice's last text and its end, what was held back of it."""
        self._newest = chunk
        for choice in chunk.get("choices") or ():
            index, delta = choice.get("index", 0), choice.get("delta") or {}
            with self._about():
                changed = self._redact(index, delta)
            if changed:
                choice.pop("logprobs", None)  # they spell what is held back
            if choice.get("finish_reason") is not None and (rest := self._rest(index)):
                if delta:
                    yield {**chunk, "choices": [{**choice, "finish_reason": None}], "usage": None}
                yield {**chunk, "choices": [{"index": index, "delta": rest, "finish_reason": None}], "usage": None}
                choice["delta"] = {}
                choice.pop("logprobs", None)
        yield chunk

    def end(self) -> Iterator[dict[str, Any]]:
        """What is still held back of choices that never ended, as the stream is over or has failed."""
        for index in sorted({place[0] for place in self._streams}):
            if rest := self._rest(index):
                yield {**self._newest, "choices": [{"index": index, "delta": rest, "finish_reason": None}]}

    def _redact(self, index: int, delta: dict[str, Any]) -> bool:
        """Redact in place; whether a text is not as it came."""
        changed = False
        for name, came in delta.items():
            if name in TEXTS and isinstance(came, str):
                delta[name] = self._stream(index, name).feed(came)
                changed |= came != delta[name]
            elif name != "tool_calls":
                delta[name] = self._redactor.redact_json(came, patterns=False)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if isinstance(function.get("name"), str):
                function["name"] = self._redactor.redact(function["name"], patterns=False)
            if isinstance(function.get("arguments"), str):
                place = call.get("index", 0)
                function["arguments"] = self._stream(index, place).feed(function["arguments"])
        return changed

    def _rest(self, index: int) -> dict[str, Any]:
        """The delta of what was held back of a choice."""
        delta: dict[str, Any] = {}
        for place in [place for place in self._streams if place[0] == index]:
            with self._about():
                text = self._streams.pop(place).end()
            if text and isinstance(place[1], str):
                delta[place[1]] = text
            elif text:
                delta.setdefault("tool_calls", []).append({"index": place[1], "function": {"arguments": text}})
        return delta

    def _stream(self, index: int, place: str | int) -> RedactorStream:
        stream = self._streams.get((index, place))
        if stream is None:
            stream = self._streams[(index, place)] = self._redactor.stream(patterns=False)
        return stream
