"""Between OpenAI's messages, which the loop keeps, and those of pydantic-ai, which its model layer takes and gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.tools import ToolDefinition

from corral_plugins.workers.node.messages import Message


def to_model(messages: Iterable[Message]) -> list[ModelMessage]:
    """The conversation for the model layer."""
    return [_response(message) if message["role"] == "assistant" else _request(message) for message in messages]


def _request(message: Message) -> ModelRequest:
    text = str(message["content"] or "")
    if message["role"] == "system":
        return ModelRequest(parts=[SystemPromptPart(content=text)])
    if message["role"] == "tool":  # on the wire a result has no name, only the id of its call
        return ModelRequest(parts=[ToolReturnPart(tool_name="", content=text, tool_call_id=message["tool_call_id"])])
    return ModelRequest(parts=[UserPromptPart(content=text)])


def _response(message: Message) -> ModelResponse:
    text: list[TextPart | ToolCallPart] = [TextPart(content=message["content"])] if message.get("content") else []
    calls = [
        ToolCallPart(
            tool_name=call["function"]["name"], args=call["function"]["arguments"] or "{}", tool_call_id=call["id"]
        )
        for call in message.get("tool_calls") or ()
    ]
    return ModelResponse(parts=[*text, *calls])


def from_model(response: ModelResponse) -> Message:
    """The answer as an assistant message. Thoughts are the model's own: they are not kept."""
    text = "".join(part.content for part in response.parts if isinstance(part, TextPart))
    calls = [
        {"id": part.tool_call_id, "type": "function", "function": {"name": part.tool_name, "arguments": _text(part)}}
        for part in response.parts
        if isinstance(part, ToolCallPart)
    ]
    message: Message = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        message["tool_calls"] = calls
    return message


def _text(part: ToolCallPart) -> str:
    """The arguments as the model wrote them."""
    return part.args if isinstance(part.args, str) else json.dumps(part.args or {})


def definitions(tools: Sequence[Mapping[str, Any]]) -> list[ToolDefinition]:
    """The tools of a claim for the model layer; their names must be those of the wire already."""
    return [
        ToolDefinition(
            name=tool["name"],
            description=tool.get("description"),
            parameters_json_schema=tool.get("schema") or {"type": "object", "properties": {}},
        )
        for tool in tools
    ]
