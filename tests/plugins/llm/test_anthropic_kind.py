"""The kind `anthropic` against a server that responds like Anthropic's."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up

from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.providers.anthropic import AnthropicStreamReader, to_body

pytestmark = pytest.mark.one_engine

PIXEL = base64.b64encode(b"not really a png").decode()
USAGE = {"input_tokens": 20, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 30, "output_tokens": 9}
EVENTS: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-x",
            "content": [],
            "usage": {**USAGE, "output_tokens": 1},
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Let me "}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "look."}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}},
    },
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"wh'}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": 'ere": 1}'}},
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
    {"type": "message_stop"},
]


@pytest.fixture
async def kit(make_kit: Callable[..., Any], upstream: Any) -> Any:
    providers = {
        "anthropic": {
            "base_url": upstream.url.removesuffix("/v1"),
            "api_key": up.KEY,
            "max_retries": 0,
            "models": [{"id": "claude-x", "capabilities": {"images": True}}],
        }
    }
    return await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})


REQUEST = {
    "model": "anthropic/claude-x",
    "max_tokens": 100,
    "temperature": 1.5,
    "stop": "END",
    "seed": 7,
    "parallel_tool_calls": False,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"where": 2}'}},
                {"id": "t2", "type": "function", "function": {"name": "look", "arguments": ""}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "a cat"},
        {"role": "tool", "tool_call_id": "t2", "content": "a dog"},
        {"role": "user", "content": "Go on."},
    ],
}


async def test_a_request_is_mapped(kit: Any, upstream: Any) -> None:
    async def answers(exchange: up.Exchange) -> None:
        content = [
            {"type": "text", "text": "A cat."},
            {"type": "tool_use", "id": "t3", "name": "look", "input": {"a": 1}},
        ]
        message = {"id": "msg_1", "model": "claude-x", "content": content, "stop_reason": "tool_use", "usage": USAGE}
        await exchange.json(message)

    upstream.otherwise = answers
    alice = await kit.as_user("member")
    answer = await alice.post("/llm/chat/completions", REQUEST)
    assert answer.status == 200, answer
    assert answer.headers["corral-ignored"] == "seed"
    (request,) = upstream.requests
    assert request.path == "/v1/messages"
    assert (request.headers["x-api-key"], request.headers["anthropic-version"]) == (up.KEY, "2023-06-01")
    assert request.body == {
        "model": "claude-x",
        "max_tokens": 100,
        "temperature": 1.0,
        "stop_sequences": ["END"],
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "look", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "t1", "name": "look", "input": {"where": 2}},
                    {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "a cat"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "a dog"}]},
                    {"type": "text", "text": "Go on."},
                ],
            },
        ],
    }
    body = answer.json()
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["choices"][0]["message"]["content"] == "A cat."
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert (call["id"], json.loads(call["function"]["arguments"])) == ("t3", {"a": 1})
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (150, 9)
    (row,) = (await alice.get("/llm/calls")).json()["items"]
    assert [row[f"{name}_tokens"] for name in ("input", "cache_read", "cache_write", "output")] == [20, 100, 30, 9]


async def test_a_stream_is_mapped(kit: Any, upstream: Any) -> None:
    async def streams(exchange: up.Exchange) -> None:
        await exchange.begin()
        for event in EVENTS:
            await exchange.event(event, str(event["type"]))

    upstream.otherwise = streams
    alice = await kit.as_user("member")
    answer = await alice.post("/llm/chat/completions", {**REQUEST, **up.WITH_USAGE})
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert (calls[0]["id"], calls[0]["function"]["name"], {call["index"] for call in calls}) == ("toolu_1", "look", {0})
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"where": 1}
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "tool_calls"
    assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (150, 9)


def test_a_call_without_arguments_has_an_empty_object() -> None:
    reader = AnthropicStreamReader("claude-x")
    events = [*EVENTS[:7], {**EVENTS[7], "delta": {"type": "input_json_delta", "partial_json": ""}}, *EVENTS[9:]]
    choices = [choice for event in events for chunk in reader.chunks_of_event(event) for choice in chunk["choices"]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls) == "{}"


async def test_error_responses_become_problems(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")

    async def refuses(exchange: up.Exchange) -> None:
        await exchange.json({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 529)

    upstream.otherwise = refuses
    answer = await alice.post("/llm/chat/completions", REQUEST)
    assert (answer.status, answer.code) == (502, "provider_error")
    assert "Overloaded" in answer.json()["detail"]

    async def breaks(exchange: up.Exchange) -> None:
        await exchange.begin()
        for event in EVENTS[:4]:
            await exchange.event(event)
        await exchange.event({"type": "error", "error": {"type": "rate_limit_error", "message": "slower"}})

    upstream.otherwise = breaks
    answer = await alice.post("/llm/chat/completions", {**REQUEST, "stream": True})
    last = json.loads(answer.body.decode().strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "rate_limited"


async def test_models_are_fetched(make_kit: Callable[..., Any], upstream: Any) -> None:
    async def lists(exchange: up.Exchange) -> None:
        await exchange.json({"data": [{"id": "claude-a", "type": "model"}, {"id": "claude-b", "max_tokens": 64000}]})

    upstream.otherwise = lists
    providers = {"anthropic": {"base_url": upstream.url, "api_key": up.KEY}}
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})
    admin = await kit.as_user("admin")
    answer = await admin.post("/llm/providers/anthropic/refresh")
    assert answer.json()["listed_models"] == ["claude-a", "claude-b"]
    assert upstream.requests[0].path == "/v1/models?limit=1000"
    model = (await admin.get("/llm/models/anthropic/claude-b")).json()
    assert model["max_output_tokens"] == 64000


def test_invalid_arguments_are_the_callers_error() -> None:
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(ProviderError) as failure:
        to_body({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert failure.value.status == 400
