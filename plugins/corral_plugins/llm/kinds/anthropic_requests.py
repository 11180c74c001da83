"""From OpenAI's chat completion request to Anthropic's Messages request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from corral_plugins.llm.api import ProviderError

HONOURED = frozenset(
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
DEFAULT_MAX_TOKENS = 4096  # the field is mandatory there


def body_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/messages`."""
    instructions, talk = _split(request["messages"])
    body: dict[str, Any] = {
        "model": request["model"],
        "max_tokens": request.get("max_completion_tokens") or request.get("max_tokens") or DEFAULT_MAX_TOKENS,
        "messages": _turns(talk),
    }
    if instructions:
        body["system"] = instructions
    if "temperature" in request:
        body["temperature"] = min(request["temperature"], 1.0)  # the scale ends at 1 there
    if "top_p" in request:
        body["top_p"] = request["top_p"]
    if stop := request.get("stop"):
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if request.get("tools"):
        body["tools"] = [_tool(item["function"]) for item in request["tools"]]
        if choice := _choice(request):
            body["tool_choice"] = choice
    return body


def _split(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """Instructions, wherever they stand, and the talk."""
    instructions = [
        part
        for message in messages
        if message["role"] in ("system", "developer")
        for part in _parts(message.get("content"))
    ]
    return instructions, [message for message in messages if message["role"] not in ("system", "developer")]


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns alternate there: what one side says in several messages is one turn; results of tools are the user's."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        blocks = _blocks(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    return turns


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    if message["role"] == "tool":
        content = _parts(message.get("content"))
        return [{"type": "tool_result", "tool_use_id": message.get("tool_call_id") or "", "content": content}]
    return [*_parts(message.get("content")), *map(_tool_use, message.get("tool_calls") or ())]


def _parts(content: Any) -> list[dict[str, Any]]:
    """Texts and images; empty texts are refused there."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_part(part) for part in content or () if part.get("type") != "text" or part["text"]]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    head, _, data = part["image_url"]["url"].partition(",")
    media = head.removeprefix("data:").partition(";")[0]
    return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}


def _tool_use(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        raise ProviderError(400, f"The arguments of the tool call {call['id']} are not JSON.") from None
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    tool = {"name": function["name"], "input_schema": schema}
    return {**tool, "description": function["description"]} if function.get("description") else tool


def _choice(request: Mapping[str, Any]) -> dict[str, Any] | None:
    asked = request.get("tool_choice")
    if isinstance(asked, dict):
        choice: dict[str, Any] = {"type": "tool", "name": (asked.get("function") or {}).get("name", "")}
    elif asked in ("auto", "none", "required"):
        choice = {"type": "any" if asked == "required" else asked}
    else:
        choice = {}
    if request.get("parallel_tool_calls") is False and choice.get("type") != "none":
        choice = {"type": "auto", **choice, "disable_parallel_tool_use": True}
    return choice or None
