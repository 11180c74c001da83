"""From Anthropic's message, or the events of its stream, to OpenAI's chat completion and its chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from corral import clock
from corral_plugins.llm.api import ProviderError

FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
    "model_context_window_exceeded": "length",
}
STATUS = {
    "authentication_error": 401,
    "invalid_request_error": 400,
    "not_found_error": 404,
    "overloaded_error": 529,
    "permission_error": 403,
    "rate_limit_error": 429,
    "request_too_large": 413,
    "timeout_error": 504,
}


def completion(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A whole message."""
    blocks = answer["content"]
    text = "".join(block.get("text", "") for block in blocks if block.get("type") == "text")
    calls = [_call(block) for block in blocks if block.get("type") == "tool_use"]
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        message["tool_calls"] = calls
    finish = FINISH.get(answer.get("stop_reason") or "", "stop")
    return {
        "id": answer.get("id", ""),
        "object": "chat.completion",
        "created": int(clock.time_s()),
        "model": answer.get("model", ""),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": usage(answer.get("usage") or {}),
    }


def usage(told: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI counts cached tokens as part of the prompt, Anthropic beside it."""
    read, written = told.get("cache_read_input_tokens") or 0, told.get("cache_creation_input_tokens") or 0
    prompt = (told.get("input_tokens") or 0) + read + written
    output = told.get("output_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
    }


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": block["name"], "arguments": json.dumps(block.get("input") or {})}
    return {"id": block["id"], "type": "function", "function": function}


class StreamReader:
    """Reads the events of one stream. `ended`: the message is complete."""

    def __init__(self, model: str) -> None:
        self._head: dict[str, Any] = {
            "id": "",
            "object": "chat.completion.chunk",
            "created": int(clock.time_s()),
            "model": model,
        }
        self._usage: dict[str, Any] = {}
        self._tools: dict[int, int] = {}  # index of the block -> index of the call
        self._silent: set[int] = set()  # calls whose arguments have not been told
        self.ended = False

    def read(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks that an event makes, if any; raises `ProviderError` for an error."""
        kind = event.get("type")
        if kind == "message_start":
            message = event["message"]
            self._head |= {"id": message.get("id", ""), "model": message.get("model", self._head["model"])}
            self._count(message.get("usage"))
            yield self._chunk({"role": "assistant", "content": ""})
        elif kind == "content_block_start":
            yield from self._block(event)
        elif kind == "content_block_delta":
            yield from self._delta(event)
        elif kind == "content_block_stop" and event["index"] in self._silent:
            yield self._arguments(event["index"], "{}")
        elif kind == "message_delta":
            self._count(event.get("usage"))
            yield self._chunk({}, FINISH.get(event["delta"].get("stop_reason") or "", "stop"))
        elif kind == "message_stop":
            self.ended = True
            yield {**self._head, "choices": [], "usage": usage(self._usage)}
        elif kind == "error":
            error = event.get("error") or {}
            raise ProviderError(STATUS.get(error.get("type", ""), 502), str(error.get("message") or error))

    def _block(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        block = event["content_block"]
        if block.get("type") == "tool_use":
            index = self._tools[event["index"]] = len(self._tools)
            self._silent.add(event["index"])
            function = {"name": block["name"], "arguments": ""}
            yield self._tool({"index": index, "id": block["id"], "type": "function", "function": function})
        elif block.get("text"):
            yield self._chunk({"content": block["text"]})

    def _delta(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        delta = event["delta"]
        if delta.get("type") == "text_delta":
            yield self._chunk({"content": delta["text"]})
        elif delta.get("type") == "input_json_delta" and delta["partial_json"] and event["index"] in self._tools:
            yield self._arguments(event["index"], delta["partial_json"])

    def _arguments(self, block: int, text: str) -> dict[str, Any]:
        self._silent.discard(block)
        return self._tool({"index": self._tools[block], "function": {"arguments": text}})

    def _tool(self, call: dict[str, Any]) -> dict[str, Any]:
        return self._chunk({"tool_calls": [call]})

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    def _count(self, told: Mapping[str, Any] | None) -> None:
        """Later counts stand for all before; zeros of the last event do not take back what the first one told."""
        self._usage |= {name: n for name, n in (told or {}).items() if isinstance(n, int) and n}
