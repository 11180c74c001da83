"""The provider kind `anthropic`, which translates between OpenAI's format and Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from corral import clock
from corral_plugins.llm.api import ModelInfo, ProviderConnection, ProviderError
from corral_plugins.llm.providers.http import ProviderHttp, positive_or_none

API_VERSION = "2023-06-01"
CAPABILITIES = {"tools": True, "json": "none", "images": True, "stream": True, "embeddings": False, "reasoning": False}
SUPPORTED_FIELDS = frozenset(
    {
        "max_completion_tokens",
        "max_tokens",
        "parallel_tool_calls",
        "stop",
        "temperature",
        "tool_choice",
        "tools",
        "top_p",
    }
)
DEFAULT_MAX_TOKENS = 4096  # Anthropic requires the field
FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
    "model_context_window_exceeded": "length",
}
ERROR_STATUS = {
    "authentication_error": 401,
    "invalid_request_error": 400,
    "not_found_error": 404,
    "overloaded_error": 529,
    "permission_error": 403,
    "rate_limit_error": 429,
    "request_too_large": 413,
    "timeout_error": 504,
}


class AnthropicProvider:
    """Implements `LLMProvider` for Anthropic's Messages API."""

    kind = "anthropic"
    config_schema: Mapping[str, Any] = {"type": "object", "additionalProperties": False}
    supported_fields = SUPPORTED_FIELDS

    def __init__(self, http: ProviderHttp) -> None:
        self._http = http

    def list_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        return connection.models

    async def fetch_models(self, connection: ProviderConnection) -> Sequence[ModelInfo]:
        """Fetch the list of models from Anthropic."""
        url = _endpoint_url(connection, "models?limit=1000")
        response = await self._http.get_json(connection, url, _request_headers(connection))
        models = response.get("data") if isinstance(response, dict) else None
        if not isinstance(models, list):
            raise ProviderError(502, "The list of models is not in Anthropic's format.")
        return [_model_info(item) for item in models if isinstance(item, dict) and item.get("id")]

    async def complete(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        url = _endpoint_url(connection, "messages")
        response = await self._http.post_json(connection, url, _request_headers(connection), to_body(request))
        if not isinstance(response, dict) or not isinstance(response.get("content"), list):
            raise ProviderError(502, "The response is not a message.")
        return _to_completion(response)

    async def stream(
        self, request: dict[str, Any], connection: ProviderConnection
    ) -> AsyncGenerator[dict[str, Any], None]:
        body = {**to_body(request), "stream": True}
        reader = AnthropicStreamReader(request["model"])
        async for event in self._http.post_for_events(
            connection, _endpoint_url(connection, "messages"), _request_headers(connection), body
        ):
            for chunk in reader.chunks_of_event(event):
                yield chunk
        if not reader.is_complete:
            raise ProviderError(502, "The stream ended before the message was complete.")

    async def embed(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        raise ProviderError(404, "Anthropic does not offer embeddings.")

    async def close(self) -> None:
        """Close the HTTP clients."""
        await self._http.close()


def _endpoint_url(connection: ProviderConnection, path: str) -> str:
    if connection.base_url is None:
        raise ProviderError(503, "The provider has no base_url.", code="dependency_unavailable")
    return f"{connection.base_url.rstrip('/').removesuffix('/v1')}/v1/{path}"


def _request_headers(connection: ProviderConnection) -> dict[str, str]:
    key = {"x-api-key": connection.api_key} if connection.api_key else {}
    return {**connection.headers, **key, "anthropic-version": API_VERSION}


def _model_info(item: Mapping[str, Any]) -> ModelInfo:
    return ModelInfo(
        id=str(item["id"])[:200],
        capabilities=CAPABILITIES,
        context_window=positive_or_none(item.get("max_input_tokens")),
        max_output_tokens=positive_or_none(item.get("max_tokens")),
    )


# -- requests


def to_body(request: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an OpenAI request to the body of `POST /v1/messages`."""
    system, conversation = _split_system_messages(request["messages"])
    body: dict[str, Any] = {
        "model": request["model"],
        "max_tokens": request.get("max_completion_tokens") or request.get("max_tokens") or DEFAULT_MAX_TOKENS,
        "messages": _to_turns(conversation),
    }
    if system:
        body["system"] = system
    if "temperature" in request:
        body["temperature"] = min(request["temperature"], 1.0)  # Anthropic's maximum
    if "top_p" in request:
        body["top_p"] = request["top_p"]
    if stop := request.get("stop"):
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if request.get("tools"):
        body["tools"] = [_to_tool(item["function"]) for item in request["tools"]]
        if choice := _tool_choice(request):
            body["tool_choice"] = choice
    return body


def _split_system_messages(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """Separate the system messages, which may occur anywhere in the conversation, from the other messages."""
    system = [
        part
        for message in messages
        if message["role"] in ("system", "developer")
        for part in _to_content_blocks(message.get("content"))
    ]
    return system, [message for message in messages if message["role"] not in ("system", "developer")]


def _to_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert messages to Anthropic's turns by merging consecutive messages with the same role.

    Turns must alternate between user and assistant, and tool results are part of the user's turn.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        blocks = _to_blocks(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    return turns


def _to_blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = _to_content_blocks(message.get("content"))
    if message["role"] == "tool":
        return [{"type": "tool_result", "tool_use_id": message.get("tool_call_id") or "", "content": content}]
    return [*content, *map(_tool_use, message.get("tool_calls") or ())]


def _to_content_blocks(content: Any) -> list[dict[str, Any]]:
    """Convert message content to text and image blocks. Empty strings are omitted, because Anthropic rejects them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_to_content_block(part) for part in content or () if part.get("type") != "text" or part["text"]]


def _to_content_block(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    head, _, data = part["image_url"]["url"].partition(",")
    media_type = head.removeprefix("data:").partition(";")[0]
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def _tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        raise ProviderError(400, f"The arguments of the tool call {call['id']} are not JSON.") from None
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}


def _to_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    tool = {"name": function["name"], "input_schema": schema}
    return {**tool, "description": function["description"]} if function.get("description") else tool


def _tool_choice(request: Mapping[str, Any]) -> dict[str, Any] | None:
    requested = request.get("tool_choice")
    choice: dict[str, Any] = {}
    if isinstance(requested, dict):
        choice = {"type": "tool", "name": (requested.get("function") or {}).get("name", "")}
    elif requested in ("auto", "none", "required"):
        choice = {"type": "any" if requested == "required" else requested}
    if request.get("parallel_tool_calls") is False and choice.get("type") != "none":
        choice = {"type": "auto", **choice, "disable_parallel_tool_use": True}
    return choice or None


# -- responses


def _to_completion(response: Mapping[str, Any]) -> dict[str, Any]:
    blocks = response["content"]
    text = "".join(block.get("text", "") for block in blocks if block.get("type") == "text")
    calls = [_tool_call(block) for block in blocks if block.get("type") == "tool_use"]
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        message["tool_calls"] = calls
    finish = FINISH_REASONS.get(response.get("stop_reason") or "", "stop")
    return {
        "id": response.get("id", ""),
        "object": "chat.completion",
        "created": int(clock.time_s()),
        "model": response.get("model", ""),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": _to_usage(response.get("usage") or {}),
    }


def _to_usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Convert Anthropic's token counts to OpenAI's format, in which the prompt tokens include cached tokens."""
    cache_read, cache_write = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
    prompt = (usage.get("input_tokens") or 0) + cache_read + cache_write
    output = usage.get("output_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cache_read, "cache_write_tokens": cache_write},
    }


def _tool_call(block: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": block["name"], "arguments": json.dumps(block.get("input") or {})}
    return {"id": block["id"], "type": "function", "function": function}


class AnthropicStreamReader:
    """Converts the events of one Anthropic stream to chunks in OpenAI's format.

    `is_complete` is true after the end of the message.
    """

    def __init__(self, model: str) -> None:
        self._head: dict[str, Any] = {
            "id": "",
            "object": "chat.completion.chunk",
            "created": int(clock.time_s()),
            "model": model,
        }
        self._usage: dict[str, Any] = {}
        self._tool_indexes: dict[int, int] = {}  # index of the content block -> index of the tool call
        self._without_arguments: set[int] = set()  # content blocks of tool calls without arguments so far
        self.is_complete = False

    def chunks_of_event(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an event. Raise `ProviderError` for an error event."""
        kind = event.get("type")
        if kind == "message_start":
            message = event["message"]
            self._head |= {"id": message.get("id", ""), "model": message.get("model", self._head["model"])}
            self._add_usage(message.get("usage"))
            yield self._delta_chunk({"role": "assistant", "content": ""})
        elif kind == "content_block_start":
            yield from self._block_start(event)
        elif kind == "content_block_delta":
            yield from self._block_delta(event)
        elif kind == "content_block_stop" and event["index"] in self._without_arguments:
            yield self._arguments_chunk(event["index"], "{}")
        elif kind == "message_delta":
            self._add_usage(event.get("usage"))
            yield self._delta_chunk({}, FINISH_REASONS.get(event["delta"].get("stop_reason") or "", "stop"))
        elif kind == "message_stop":
            self.is_complete = True
            yield {**self._head, "choices": [], "usage": _to_usage(self._usage)}
        elif kind == "error":
            error = event.get("error") or {}
            raise ProviderError(ERROR_STATUS.get(error.get("type", ""), 502), str(error.get("message") or error))

    def _block_start(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        block = event["content_block"]
        if block.get("type") == "tool_use":
            index = self._tool_indexes[event["index"]] = len(self._tool_indexes)
            self._without_arguments.add(event["index"])
            function = {"name": block["name"], "arguments": ""}
            yield self._tool_chunk({"index": index, "id": block["id"], "type": "function", "function": function})
        elif block.get("text"):
            yield self._delta_chunk({"content": block["text"]})

    def _block_delta(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        delta, index = event["delta"], event["index"]
        if delta.get("type") == "text_delta":
            yield self._delta_chunk({"content": delta["text"]})
        elif delta.get("type") == "input_json_delta" and delta["partial_json"] and index in self._tool_indexes:
            yield self._arguments_chunk(index, delta["partial_json"])

    def _arguments_chunk(self, block: int, text: str) -> dict[str, Any]:
        self._without_arguments.discard(block)
        return self._tool_chunk({"index": self._tool_indexes[block], "function": {"arguments": text}})

    def _tool_chunk(self, call: dict[str, Any]) -> dict[str, Any]:
        return self._delta_chunk({"tool_calls": [call]})

    def _delta_chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    def _add_usage(self, usage: Mapping[str, Any] | None) -> None:
        """Update the token counts.

        Each later count is a total that replaces the earlier count. Zeros are ignored, because the last event may
        contain zeros instead of the totals.
        """
        self._usage |= {name: n for name, n in (usage or {}).items() if isinstance(n, int) and n}
