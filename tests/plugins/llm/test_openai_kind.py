"""The kind `openai` against a real server: requests, responses and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up

from corral.testing.kit import Answer, Client
from corral_plugins.llm.models import LlmProviderRow
from corral_plugins.llm.shapes import ChatRequest

pytestmark = pytest.mark.one_engine


@pytest.fixture
async def kit(make_kit: Callable[..., Any], providers: dict[str, Any]) -> Any:
    settings = {"settings.llm.default_model": "up/m1"}
    return await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}, **settings})


async def chat(client: Client, model: str = "up/m1", **more: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return await client.post("/llm/chat/completions", body)


def chunks_of(answer: Answer) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_completion_is_relayed_with_allowed_fields(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    fields: dict[str, Any] = {
        "frequency_penalty": 0.1,
        "logit_bias": {"5": 1.0},
        "logprobs": True,
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "n": 1,
        "parallel_tool_calls": False,
        "prediction": {"type": "content", "content": "x"},
        "presence_penalty": 0.2,
        "prompt_cache_key": "key",
        "reasoning_effort": "low",
        "response_format": {"type": "text"},
        "safety_identifier": "someone",
        "seed": 7,
        "service_tier": "flex",
        "stop": ["x"],
        "temperature": 0.5,
        "tool_choice": "auto",
        "tools": [tool],
        "top_logprobs": 2,
        "top_p": 0.9,
        "user": "u",
        "verbosity": "low",
    }
    answer = await chat(alice, store=True, **fields)
    assert answer.status == 200, answer
    assert answer.json()["choices"][0]["message"]["content"] == "hello from upstream"
    assert answer.json()["model"] == answer.headers["corral-model"] == "up/m1"
    assert answer.headers["corral-ignored"] == "store"
    (request,) = upstream.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == f"Bearer {up.KEY}"
    assert request.body == {
        "model": "m1",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 500,
        "store": False,
        **fields,
    }
    known = {*ChatRequest.__struct_fields__} - {"stream", "stream_options", "max_completion_tokens"}
    assert request.body.keys() == known  # a new field must be sent on as well


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_cap_keeps_its_name(kit: Any, upstream: Any, field: str) -> None:
    cap: dict[str, Any] = {field: 33}
    assert (await chat(await kit.as_user("member"), **cap)).status == 200
    sent = upstream.requests[0].body
    assert {name: sent[name] for name in sent if name.startswith("max_")} == cap


async def test_options_of_streams_are_relayed(kit: Any, upstream: Any) -> None:
    options = {"include_usage": False, "include_obfuscation": False}
    assert (await chat(await kit.as_user("member"), stream=True, stream_options=options)).status == 200
    assert upstream.requests[0].body["stream_options"] == {"include_usage": True, "include_obfuscation": False}


async def test_fields_of_other_vendors_need_passthrough(
    make_kit: Callable[..., Any], upstream: Any, providers: dict[str, Any]
) -> None:
    providers["open"] = {**providers["up"], "passthrough": True}
    settings = {"settings.llm.default_model": "open/m1", "settings.llm.default_fallback_models": ["up/m1"]}
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}, **settings})
    alice, vendor = await kit.as_user("member"), {"top_k": 5, "extra_body": {"a": [1]}, "undeclared": 1}
    refused = await chat(alice, "up/m1", **vendor)
    assert (refused.status, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert [each["pointer"] for each in refused.json()["errors"]] == ["/extra_body", "/top_k", "/undeclared"]
    assert upstream.requests == []
    sent_on = await chat(alice, "open/m1", **vendor)
    assert (sent_on.status, "corral-ignored" in sent_on.headers) == (200, False)
    assert vendor.items() <= upstream.requests[0].body.items()
    upstream.behaviours = [up.refuses(503)]
    fallback = await chat(alice, "default", **vendor)
    assert (fallback.headers["corral-model"], fallback.status) == ("up/m1", 200)
    assert fallback.headers["corral-ignored"] == "extra_body, top_k, undeclared"
    assert not vendor.keys() & upstream.requests[2].body.keys()
    assert (await alice.get("/llm/providers/open")).status == 403


async def test_passthrough_is_a_field_of_providers(kit: Any) -> None:
    admin = await kit.as_user("admin")
    new = {"name": "mine", "kind": "openai", "base_url": "http://nowhere.invalid/v1", "passthrough": True}
    assert (await admin.post("/llm/providers", new)).json()["passthrough"] is True
    assert (await admin.put("/llm/providers/mine", {"passthrough": False})).json()["passthrough"] is False
    assert (await admin.get("/llm/providers/up")).json()["passthrough"] is False


async def test_reasoning_may_be_sent_back_and_is_dropped(kit: Any, upstream: Any) -> None:
    alice, said = await kit.as_user("member"), up.completion("")
    call = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    said["choices"][0]["message"] |= {"content": None, "reasoning_content": "hm", "tool_calls": [call]}
    upstream.behaviours = [up.says("", choices=said["choices"])]
    message = (await chat(alice)).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "hm"
    message["tool_calls"][0]["index"] = 0
    talk = [{"role": "user", "content": "hi"}, message, {"role": "tool", "tool_call_id": "t1", "content": "found"}]
    answer = await alice.post("/llm/chat/completions", {"model": "up/m1", "messages": talk})
    assert answer.status == 200, answer
    sent = upstream.requests[1].body["messages"]
    assert sent[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    refused = await alice.post("/llm/chat/completions", {"model": "up/m1", "messages": [{**talk[0], "surprise": 1}]})
    assert (refused.status, refused.json()["errors"][0]["pointer"]) == (400, "/messages/0/surprise")


async def test_usage_becomes_one_cost_event(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "total_tokens": 107,
        "cost": 0.0125,
        "prompt_tokens_details": {"cached_tokens": 60},
    }
    upstream.otherwise = up.says("ok", usage=usage)
    answer = await chat(alice)
    assert answer.headers["corral-cost-usd"] == "0.012500"
    assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 60}
    (row,) = (await alice.get("/llm/calls")).json()["items"]
    assert (row["input_tokens"], row["cache_read_tokens"], row["output_tokens"]) == (40, 60, 7)
    assert (row["cost_usd"], row["estimated"]) == (0.0125, False)
    (event,) = (await alice.get("/cost/events")).json()["items"]
    assert (event["usage_key"], event["input_tokens"], event["cost_usd"]) == (row["id"], 40, 0.0125)


async def test_an_unpriced_model_is_not_free(kit: Any) -> None:
    answer = await chat(await kit.as_user("member"), model="up/m2")
    assert answer.headers["corral-cost-usd"] == "unpriced"


async def test_a_stream_is_relayed_and_its_usage_is_requested(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    upstream.otherwise = up.streams("one ", "two ", "three")
    answer = await chat(alice, **up.WITH_USAGE)
    found = chunks_of(answer)
    assert found[-1] == "[DONE]"
    assert found[-2]["usage"]["completion_tokens"] == 3
    text = "".join(choice["delta"].get("content") or "" for each in found[:-1] for choice in each["choices"])
    assert text == "one two three"
    assert {each["model"] for each in found[:-1]} == {"up/m1"}
    assert upstream.requests[0].body["stream_options"] == {"include_usage": True}
    (row,) = (await alice.get("/llm/calls")).json()["items"]
    assert (row["status"], row["input_tokens"], row["output_tokens"]) == ("completed", 11, 3)


async def test_a_long_silence_is_filled_with_comments(kit: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_plugins.llm.routes.completions.COMMENT_SECONDS", 0.1)
    alice = await kit.as_user("member")

    async def silence() -> None:
        for _ in range(70):  # also the comments that are due during a pause of the machine come one by one
            await asyncio.sleep(0.005)

    async def thinks(exchange: up.Exchange) -> None:
        await silence()
        await up.streams("late")(exchange)

    async def fails(exchange: up.Exchange) -> None:
        await silence()
        await up.refuses(500, "too late for a status")(exchange)

    upstream.behaviours = [thinks, fails]
    whole = await chat(alice, stream=True)
    assert whole.body.startswith(b": waiting\n\n: waiting\n\n")
    assert whole.body.endswith(b"data: [DONE]\n\n")
    failed = await chat(alice, stream=True)
    assert (failed.status, failed.body.endswith(b"data: [DONE]\n\n")) == (200, False)
    assert b"too late for a status" in failed.body


async def test_missing_usage_is_estimated(kit: Any, upstream: Any) -> None:
    async def silent(exchange: up.Exchange) -> None:
        await exchange.begin()
        await exchange.event(up.chunk("x" * 40))
        await exchange.event(up.chunk(None, "stop"))
        await exchange.event("[DONE]")

    upstream.otherwise = silent
    alice = await kit.as_user("member")
    found = chunks_of(await chat(alice, **up.WITH_USAGE))
    assert found[-2]["usage"]["completion_tokens"] == 10
    (row,) = (await alice.get("/llm/calls")).json()["items"]
    assert (row["output_tokens"], row["estimated"]) == (10, True)


@pytest.mark.parametrize(
    ("status", "expected", "code", "kind"),
    [
        (400, 400, "validation_error", None),
        (413, 400, "validation_error", None),
        (401, 502, "provider_error", "credentials"),
        (404, 502, "provider_error", "model"),
        (429, 429, "rate_limited", None),
        (500, 502, "provider_error", "provider"),
        (504, 504, "upstream_timeout", None),
        (302, 502, "provider_error", "provider"),
        (405, 502, "provider_error", "provider"),
        (451, 502, "provider_error", "provider"),
    ],
)
async def test_refusals(kit: Any, upstream: Any, status: int, expected: int, code: str, kind: str | None) -> None:
    alice = await kit.as_user("member")
    upstream.otherwise = up.refuses(status, f"no, and {up.KEY} is the key", retry_after="7")
    for stream in (False, True):
        answer = await chat(alice, stream=stream)
        assert (answer.status, answer.code, answer.json().get("kind")) == (expected, code, kind)
        assert "no, and [redacted] is the key" in answer.json()["detail"]
        assert answer.json()["error"]["message"] == answer.json()["detail"]
        assert up.KEY not in answer.body.decode()
        is_final = status in (400, 413, 401, 404)
        assert answer.headers.get("x-should-retry") == ("false" if is_final else None)
    if status == 429:
        assert answer.headers["retry-after"] == "7"
    assert (await alice.get("/cost/events")).json()["items"] == []
    alerts = [json.loads(event.data) for event in await kit.events() if event.type == "system.alert"]
    assert [alert["kind"] for alert in alerts] == (["llm_credentials"] if status == 401 else [])


async def test_the_code_and_field_of_a_refusal_are_kept(kit: Any, upstream: Any) -> None:
    reported = {
        "message": f"Too long for {up.KEY}.",
        "type": "invalid_request_error",
        "code": "context_length_exceeded",
        "param": "messages.0.content",
    }

    async def refuses(exchange: up.Exchange) -> None:
        await exchange.json({"error": reported}, 400)

    async def breaks(exchange: up.Exchange) -> None:
        await exchange.begin()
        await exchange.event(up.chunk("half "))
        await exchange.event({"error": {**reported, "code": "content_filter"}})

    upstream.behaviours = [refuses, refuses, breaks]
    alice = await kit.as_user("member")
    told = {**reported, "message": "up: Too long for [redacted]."}
    for stream in (False, True):
        answer = await chat(alice, stream=stream)
        assert (answer.status, answer.code, answer.json()["error"]) == (400, "validation_error", told)
        assert answer.json()["errors"][0]["pointer"] == "/messages/0/content"
        assert answer.headers["x-should-retry"] == "false"
    assert chunks_of(await chat(alice, stream=True))[-1]["error"]["code"] == "provider_error"


async def test_an_unreachable_provider(make_kit: Callable[..., Any]) -> None:
    providers = {"dead": {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "max_retries": 0}}
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})
    answer = await chat(await kit.as_user("member"), model="dead/any")
    assert (answer.status, answer.code) == (502, "provider_error")


async def test_a_minimal_response_is_completed(kit: Any, upstream: Any) -> None:
    async def terse(exchange: up.Exchange) -> None:
        await exchange.json({"choices": [{"message": {"role": "assistant", "content": "x" * 8}}]})

    upstream.otherwise = terse
    answer = await chat(await kit.as_user("member"))
    assert (answer.status, answer.json()["object"]) == (200, "chat.completion")
    assert answer.json()["usage"]["completion_tokens"] == 2


async def test_an_address_is_checked_at_each_call(kit: Any, upstream: Any) -> None:
    """A provider created over the API, not by the operator, whose address later becomes a private one."""
    admin = await kit.as_user("admin")
    made = await admin.post(
        "/llm/providers", {"name": "mine", "kind": "openai", "base_url": "http://nowhere.invalid/v1"}
    )
    assert (made.status, made.json()["warnings"]) == (201, ["unresolved_host"])
    assert (await chat(admin, model="mine/m")).code == "provider_error"
    turn = LlmProviderRow.update(base_url=upstream.url, revision="turned")
    await kit.kernel.database.work(turn.execute)
    answer = await chat(admin, model="mine/m")
    assert (answer.status, answer.code) == (503, "dependency_unavailable")
    assert "egress.address" in answer.json()["detail"]
    assert upstream.requests == []


async def test_an_invalid_response(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")

    async def nonsense(exchange: up.Exchange) -> None:
        await exchange.json(b"<html>not me</html>")

    upstream.otherwise = nonsense
    assert (await chat(alice)).code == "provider_error"


async def test_an_error_in_the_middle_is_one_chunk_and_no_done_follows(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")

    async def breaks(exchange: up.Exchange) -> None:
        await exchange.begin()
        await exchange.event(up.chunk("half "))
        await exchange.event({"error": {"message": "out of memory", "code": 500}})

    upstream.otherwise = breaks
    found = chunks_of(await chat(alice, stream=True))
    assert found[0]["choices"][0]["delta"]["content"] == "half "
    assert found[-1]["error"]["code"] == "provider_error"
    (row,) = (await alice.get("/llm/calls")).json()["items"]
    assert (row["status"], row["output_tokens"] > 0, row["estimated"]) == ("failed", True, True)


async def test_embeddings(kit: Any, upstream: Any) -> None:
    async def embeds(exchange: up.Exchange) -> None:
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.5]}]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        await exchange.json({"object": "list", "data": data, "model": "e", "usage": usage})

    upstream.otherwise = embeds
    alice = await kit.as_user("member")
    answer = await alice.post("/llm/embeddings", {"model": "up/m2", "input": "red"})
    assert answer.status == 200, answer
    assert answer.json()["data"][0]["embedding"] == [0.5, 1.5]
    assert upstream.requests[0].body == {"model": "m2", "input": ["red"], "encoding_format": "float"}
    (event,) = (await alice.get("/cost/events")).json()["items"]
    assert (event["operation"], event["input_tokens"]) == ("embedding", 3)


async def test_the_cap_and_the_context_window(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    long = [{"role": "user", "content": "x" * 3600}]  # about 900 of 1,000 tokens
    answer = await alice.post("/llm/chat/completions", {"model": "up/m1", "messages": long})
    assert answer.status == 200
    assert upstream.requests[0].body["max_tokens"] == 96  # what is left, not the model's 500
    answer = await alice.post("/llm/chat/completions", {"model": "up/m1", "messages": long, "max_tokens": 200})
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (400, "/messages")
    assert len(upstream.requests) == 1


async def test_timeouts(make_kit: Callable[..., Any], upstream: Any, providers: dict[str, Any]) -> None:
    limits = {"first_token_seconds": 1, "idle_seconds": 1, "total_seconds": 1}
    providers["up"]["timeouts"] = limits
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})
    alice = await kit.as_user("member")
    upstream.otherwise = up.hangs
    for stream in (False, True):
        answer = await chat(alice, stream=stream)
        assert (answer.status, answer.code) == (504, "upstream_timeout")
    upstream.otherwise = up.streams("one ", "two", pause=5)
    found = chunks_of(await chat(alice, stream=True))
    assert found[-1]["error"]["code"] == "upstream_timeout"
    await asyncio.wait_for(upstream.exchanges[-1].gone.wait(), 5)


async def test_missing_models_are_fetched_at_start(
    make_kit: Callable[..., Any], upstream: Any, providers: dict[str, Any]
) -> None:
    async def lists(exchange: up.Exchange) -> None:
        await exchange.json({"data": [{"id": "found"}]})

    upstream.otherwise = lists
    del providers["up"]["models"]
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})
    assert await kit.run_jobs() == 1
    assert (await (await kit.as_user("member")).get("/llm/models/up/found")).status == 200


async def test_private_addresses_are_allowed_only_from_the_file(kit: Any) -> None:
    admin = await kit.as_user("admin")
    answer = await admin.post(
        "/llm/providers", {"name": "mine", "kind": "openai", "base_url": "http://127.0.0.1:8099/v1"}
    )
    assert (answer.status, answer.code) == (422, "url_blocked")
    assert answer.json()["errors"][0]["pointer"] == "/base_url"
    assert "CORRAL_EGRESS_ALLOW=127.0.0.1:8099" in answer.json()["detail"]
