"""The provider kind `scripted`: deterministic, free responses for tests and demos, without a network or an API key.

The model `echo` repeats the last user message. The model `words` returns embeddings. Any other model plays a script:
`{"turns": [...]}`. If the last message contains the `match` text of a turn, this turn is played. Otherwise, the turns
without `match` are played in order, and the last of them is repeated. The number of assistant messages in the
conversation selects the turn, so that a resumed conversation continues with the right turn.
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
from corral_plugins.llm.api import ModelInfo, ProviderConnection, ProviderError

ECHO, WORDS = "echo", "words"
DEFAULT_DIMENSIONS = 256
CAPABILITIES = {"tools": True, "json": "none", "images": False, "stream": True, "embeddings": False, "reasoning": False}
DEFAULT_CHUNK = 16
INLINE_TOKENS = 4000  # longer texts are embedded in a thread


class ScriptedToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool call in a script. If `id` is missing, the call receives an id that depends only on its position."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    arguments: dict[str, Any] = {}
    id: Annotated[str, Meta(min_length=1, max_length=64)] | None = None


class ScriptedError(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An error that the scripted provider returns. The status 504 simulates a provider that does not respond."""

    status: Annotated[int, Meta(ge=400, le=599)] = 500
    message: Annotated[str, Meta(max_length=1000)] = "The script specifies this error."
    retry_after: Annotated[int, Meta(ge=0, le=3600)] | None = None


class ScriptedUsage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token counts given in a script. They are reported instead of estimates."""

    prompt_tokens: Annotated[int, Meta(ge=0)] = 0
    completion_tokens: Annotated[int, Meta(ge=0)] = 0


class ScriptedTurn(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One response in a script.

    The response is sent after `delay_seconds`. In a stream, the delay is distributed over the chunks, and `chunk` is
    the number of characters per chunk.
    """

    match: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    text: str | None = None
    tool_calls: Annotated[list[ScriptedToolCall], Meta(max_length=50)] = []
    delay_seconds: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    chunk: Annotated[int, Meta(ge=1, le=65536)] = DEFAULT_CHUNK
    error: ScriptedError | None = None
    usage: ScriptedUsage | None = None


class ModelScript(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The script of a model: the list of responses that the model returns."""

    turns: Annotated[list[ScriptedTurn], Meta(min_length=1, max_length=1000)]


def load_scripts(table: Mapping[str, Any]) -> dict[str, ModelScript]:
    """Load scripts from `[plugins.llm.scripts]`, whose values are tables or paths to JSON files.

    Raise `ValueError` with the name of the script if a script is invalid.
    """
    scripts: dict[str, ModelScript] = {}
    for name, source in table.items():
        try:
            value = json.loads(Path(source).read_bytes()) if isinstance(source, str) else source
            scripts[name] = msgspec.convert(value, ModelScript)
        except (OSError, ValueError) as error:
            raise ValueError(f"llm.scripts.{name}: {error}") from None
    return scripts


class ScriptedProvider:
    """Returns scripted responses instead of calling a model, for tests and demos. Implements `LLMProvider`.

    Calls share no resources, so the number of concurrent calls is unlimited.
    """

    kind = "scripted"
    free = implicit = True
    concurrency: int | None = None
    token_input = True
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}
    supported_fields = frozenset({"max_tokens", "max_completion_tokens", "metadata", "tools", "dimensions"})

    def __init__(self, scripts: Mapping[str, ModelScript]) -> None:
        self._scripts = dict(scripts)

    def list_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        chat = [ModelInfo(id=name, capabilities=CAPABILITIES) for name in (ECHO, *sorted(self._scripts))]
        words = {**dict.fromkeys(CAPABILITIES, False), "json": "none", "embeddings": True}
        return [*chat, ModelInfo(id=WORDS, capabilities=words)]

    async def complete(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        turn, response = self._play_turn(request)
        await asyncio.sleep(turn.delay_seconds)
        return response

    async def stream(
        self, request: dict[str, Any], connection: ProviderConnection
    ) -> AsyncGenerator[dict[str, Any], None]:
        turn, response = self._play_turn(request)
        choice, message = response["choices"][0], response["choices"][0]["message"]
        head = {key: response[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
        text = message["content"] or ""
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": text[at : at + turn.chunk]} for at in range(0, len(text), turn.chunk)]
        deltas += [{"tool_calls": [{"index": n, **call}]} for n, call in enumerate(message.get("tool_calls", ()))]
        for delta in deltas:
            await asyncio.sleep(turn.delay_seconds / len(deltas))
            yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
        yield {**head, "choices": [], "usage": response["usage"]}

    async def embed(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        size = request.get("dimensions") or DEFAULT_DIMENSIONS
        texts = [text if isinstance(text, str) else " ".join(map(str, text)) for text in request["input"]]
        tokens = sum(estimate_tokens(text) for text in texts)
        if tokens > INLINE_TOKENS:
            vectors = await asyncio.to_thread(_embed_all, texts, size)
        else:
            vectors = _embed_all(texts, size)
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)],
            "model": request["model"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _play_turn(self, request: dict[str, Any]) -> tuple[ScriptedTurn, dict[str, Any]]:
        """Return the turn to play and its complete response.

        Raise `ProviderError` if the script prescribes an error, or if there is no script or turn to play.
        """
        messages: list[dict[str, Any]] = request["messages"]
        position = sum(1 for message in messages if message["role"] == "assistant")
        turn = self._matching_turn(request, messages, position)
        if turn.error is not None:
            raise ProviderError(turn.error.status, turn.error.message, retry_after=turn.error.retry_after)
        return turn, _completion_of_turn(turn, request, position)

    def _matching_turn(
        self, request: dict[str, Any], messages: Sequence[Mapping[str, Any]], position: int
    ) -> ScriptedTurn:
        name = request["model"]
        in_request = (request.get("metadata") or {}).get("script")
        if in_request is not None:
            script = _script_of_request(in_request)
        elif name == ECHO:
            return ScriptedTurn(
                text=next((_text_of(item) for item in reversed(messages) if item["role"] == "user"), "")
            )
        elif name in self._scripts:
            script = self._scripts[name]
        else:
            raise ProviderError(404, f"There is no script named {name}.")
        last = _text_of(messages[-1]) if messages else ""
        for turn in script.turns:
            if turn.match is not None and turn.match in last:
                return turn
        in_order = [turn for turn in script.turns if turn.match is None]
        if not in_order:
            raise ProviderError(400, "No turn of the script matches the last message.")
        return in_order[min(position, len(in_order) - 1)]


def _script_of_request(script: Any) -> ModelScript:
    """Return the script in the field `metadata.script` of a request.

    The script is a JSON object, or JSON in a string, because OpenAI's metadata values are strings.
    """
    try:
        return msgspec.convert(json.loads(script) if isinstance(script, str) else script, ModelScript)
    except (ValueError, RecursionError) as error:
        raise ProviderError(400, f"metadata.script: {error}") from None


def _completion_of_turn(turn: ScriptedTurn, request: Mapping[str, Any], position: int) -> dict[str, Any]:
    """Return the chat completion for a turn. A token limit in the request truncates the text."""
    text, finish = turn.text, "tool_calls" if turn.tool_calls else "stop"
    cap = request.get("max_completion_tokens") or request.get("max_tokens")
    if text is not None and cap is not None and estimate_tokens(text) > cap:
        text, finish = text.encode()[: cap * 4].decode(errors="ignore"), "length"
    message: dict[str, Any] = {"role": "assistant", "content": text if text is not None or turn.tool_calls else ""}
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{position}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, sort_keys=True)},
            }
            for index, call in enumerate(turn.tool_calls)
        ]
    usage = turn.usage or ScriptedUsage(
        prompt_tokens=estimate_tokens(json.dumps(request["messages"])),
        completion_tokens=estimate_tokens(text or "")
        + sum(estimate_tokens(json.dumps(call.arguments)) for call in turn.tool_calls),
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


def _text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message. If it has several text parts, they are joined."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens in a string, at 4 bytes per token. The estimate tends to be too high."""
    return math.ceil(len(text.encode()) / 4)


def _embed_all(texts: Sequence[str], size: int) -> list[list[float]]:
    return [embed_text(text, size) for text in texts]


def embed_text(text: str, size: int) -> list[float]:
    """Return the embedding vector of a string. Each word of the string is hashed to one dimension of the vector.

    Vectors have length 1, so strings that share words are close to each other.
    """
    vector = [0.0] * size
    for word in re.finditer(r"\w+", text.lower()):  # an iterator instead of a list, so that other threads can run
        digest = hashlib.sha256(word.group().encode()).digest()
        vector[int.from_bytes(digest[:4], "big") % size] += 1.0 if digest[4] & 1 else -1.0
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]
