"""The kind `scripted`: deterministic answers for tests and demos. No network, no key, price 0.

`echo` answers the last user message. Any other model plays a script: `{"turns": [...]}`. A turn with `match` answers
whenever the last message contains that text; the others are played in order, chosen by the number of assistant messages
that the conversation already has, so a resumed one goes on with the right turn. Past the end the last turn repeats.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from corral import clock
from corral_plugins.llm.api import Connection, ModelFacts, ProviderError

ECHO, WORDS = "echo", "words"
DIMENSIONS = 256
CAPABILITIES = {"tools": True, "json": "none", "images": False, "stream": True, "embeddings": False, "reasoning": False}
DEFAULT_CHUNK = 16
INLINE_TOKENS = 4000  # more text than this is embedded in a thread


class ScriptedToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call of a tool; without `id` it gets one that depends on its place only."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    arguments: dict[str, Any] = {}
    id: Annotated[str, Meta(min_length=1, max_length=64)] | None = None


class ScriptedError(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fail as a provider would: `status` of its answer, 504 for silence."""

    status: Annotated[int, Meta(ge=400, le=599)] = 500
    message: Annotated[str, Meta(max_length=1000)] = "The script says so."
    retry_after: Annotated[int, Meta(ge=0, le=3600)] | None = None


class ScriptedUsage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens to report instead of the estimate."""

    prompt_tokens: Annotated[int, Meta(ge=0)] = 0
    completion_tokens: Annotated[int, Meta(ge=0)] = 0


class Turn(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One answer. `chunk`: characters of a chunk in a stream, over which a delay is spread."""

    match: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    text: str | None = None
    tool_calls: Annotated[list[ScriptedToolCall], Meta(max_length=50)] = []
    delay_seconds: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    chunk: Annotated[int, Meta(ge=1, le=65536)] = DEFAULT_CHUNK
    error: ScriptedError | None = None
    usage: ScriptedUsage | None = None


class Script(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a model plays."""

    turns: Annotated[list[Turn], Meta(min_length=1, max_length=1000)]


def load_scripts(table: Mapping[str, Any]) -> dict[str, Script]:
    """The scripts of `[plugins.llm.scripts]`: tables, or paths of JSON files. `ValueError` names the bad one."""
    scripts: dict[str, Script] = {}
    for name, given in table.items():
        try:
            value = json.loads(Path(given).read_bytes()) if isinstance(given, str) else given
            scripts[name] = msgspec.convert(value, Script)
        except (OSError, ValueError) as error:
            raise ValueError(f"llm.scripts.{name}: {error}") from None
    return scripts


class ScriptedProvider:
    """Implements `LLMProvider`; `scripts` by model name. Nothing is shared, so any number of calls runs at a time."""

    kind = "scripted"
    free = implicit = True
    concurrency: int | None = None
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}
    honours = frozenset({"max_tokens", "max_completion_tokens", "metadata", "tools", "dimensions"})

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self._scripts = dict(scripts)

    def list_models(self, connection: Connection) -> Sequence[ModelFacts]:
        chat = [ModelFacts(id=name, capabilities=CAPABILITIES) for name in (ECHO, *sorted(self._scripts))]
        words = {**dict.fromkeys(CAPABILITIES, False), "json": "none", "embeddings": True}
        return [*chat, ModelFacts(id=WORDS, capabilities=words)]

    async def complete(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        turn, answer = self._answer(request)
        await asyncio.sleep(turn.delay_seconds)
        return answer

    async def stream(self, request: dict[str, Any], connection: Connection) -> AsyncGenerator[dict[str, Any], None]:
        turn, answer = self._answer(request)
        choice, message = answer["choices"][0], answer["choices"][0]["message"]
        head = {key: answer[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
        text = message["content"] or ""
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": text[at : at + turn.chunk]} for at in range(0, len(text), turn.chunk)]
        deltas += [{"tool_calls": [{"index": n, **call}]} for n, call in enumerate(message.get("tool_calls", ()))]
        for delta in deltas:
            await asyncio.sleep(turn.delay_seconds / len(deltas))
            yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
        yield {**head, "choices": [], "usage": answer["usage"]}

    async def embed(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        size = request.get("dimensions") or DIMENSIONS
        texts: list[str] = request["input"]
        tokens = sum(estimate(text) for text in texts)
        if tokens > INLINE_TOKENS:
            vectors = await asyncio.to_thread(embed_all, texts, size)
        else:
            vectors = embed_all(texts, size)
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)],
            "model": request["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _answer(self, request: dict[str, Any]) -> tuple[Turn, dict[str, Any]]:
        """The turn and the whole answer; raises `ProviderError`."""
        messages: list[dict[str, Any]] = request["messages"]
        place = sum(1 for message in messages if message["role"] == "assistant")
        turn = self._turn(request, messages, place)
        if turn.error is not None:
            raise ProviderError(turn.error.status, turn.error.message, retry_after=turn.error.retry_after)
        return turn, completion(turn, request, place)

    def _turn(self, request: dict[str, Any], messages: Sequence[Mapping[str, Any]], place: int) -> Turn:
        name = request["model"]
        given = (request.get("metadata") or {}).get("script")
        if given is not None:
            script = _given_script(given)
        elif name == ECHO:
            return Turn(text=next((text_of(item) for item in reversed(messages) if item["role"] == "user"), ""))
        elif name in self._scripts:
            script = self._scripts[name]
        else:
            raise ProviderError(404, f"There is no script {name}.")
        last = text_of(messages[-1]) if messages else ""
        for turn in script.turns:
            if turn.match is not None and turn.match in last:
                return turn
        ordered = [turn for turn in script.turns if turn.match is None]
        if not ordered:
            raise ProviderError(400, "No turn of the script matches the last message.")
        return ordered[min(place, len(ordered) - 1)]


def _given_script(given: Any) -> Script:
    """The script of a request: JSON, or the text of it (OpenAI's metadata holds strings)."""
    try:
        return msgspec.convert(json.loads(given) if isinstance(given, str) else given, Script)
    except (ValueError, RecursionError) as error:
        raise ProviderError(400, f"metadata.script: {error}") from None


def completion(turn: Turn, request: Mapping[str, Any], place: int) -> dict[str, Any]:
    """OpenAI's answer for a turn; a cap on the tokens cuts the text."""
    text, finish = turn.text, "tool_calls" if turn.tool_calls else "stop"
    cap = request.get("max_completion_tokens") or request.get("max_tokens")
    if text is not None and cap is not None and estimate(text) > cap:
        text, finish = text.encode()[: cap * 4].decode(errors="ignore"), "length"
    message: dict[str, Any] = {"role": "assistant", "content": text if text is not None or turn.tool_calls else ""}
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{place}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, sort_keys=True)},
            }
            for index, call in enumerate(turn.tool_calls)
        ]
    usage = turn.usage or ScriptedUsage(
        prompt_tokens=estimate(json.dumps(request["messages"])),
        completion_tokens=estimate(text or "") + sum(estimate(json.dumps(call.arguments)) for call in turn.tool_calls),
    )
    digest = hashlib.sha256(json.dumps([request["messages"], request["model"]], sort_keys=True).encode()).hexdigest()
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": int(clock.time_s()),
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def estimate(text: str) -> int:
    """Tokens of a text, counted high: 4 bytes each."""
    return math.ceil(len(text.encode()) / 4)


def embed_all(texts: Sequence[str], size: int) -> list[list[float]]:
    """A vector for each text."""
    return [embed(text, size) for text in texts]


def embed(text: str, size: int) -> list[float]:
    """Each word adds to one place that its hash names; the vector has length 1, so texts that share words are near."""
    vector = [0.0] * size
    for found in re.finditer(r"\w+", text.lower()):  # one after the other, so that other threads run
        digest = hashlib.sha256(found.group().encode()).digest()
        vector[int.from_bytes(digest[:4], "big") % size] += 1.0 if digest[4] & 1 else -1.0
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]
