"""The gateway over HTTP for users: completions, streams, models, providers, embeddings, and past calls."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import pytest_asyncio
from tests.limits import within
from tests.plugins.llm.conftest import shorten
from tests.shared_kernels import on_the_loop_of_the_module

from corral.testing.kit import Answer, Client

SCRIPTS = {
    "three": {"turns": [{"text": "one"}, {"text": "two"}, {"text": "three"}]},
    "slow": {"turns": [{"text": "late", "delay_seconds": 0.4}]},
    "hangs": {"turns": [{"text": "never", "delay_seconds": 60}]},
    "broken": {"turns": [{"error": {"status": 500, "message": "the model is broken"}}]},
    "keyless": {"turns": [{"error": {"status": 401, "message": "bad key"}}]},
    "busy": {"turns": [{"error": {"status": 429, "message": "busy", "retry_after": 9}}]},
    "picky": {"turns": [{"error": {"status": 400, "message": "no such role"}}]},
}


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Any:
    return await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"scripts": SCRIPTS}})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_kit(make_shared_kit: Callable[..., Any]) -> Any:
    """A kernel for the tests that look at nothing but answers."""
    return await make_shared_kit(plugins=["cost", "llm"], config={"plugins.llm": {"scripts": SCRIPTS}})


async def chat(client: Client, text: str = "hello", model: str = "scripted/echo", **more: Any) -> Answer:
    headers = more.pop("headers", None)
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return await client.post("/llm/chat/completions", body, headers=headers)


async def calls(client: Client) -> list[dict[str, Any]]:
    answer = await client.get("/llm/calls")
    assert answer.status == 200, answer
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


@pytest.mark.one_engine
async def test_a_completion_is_openais_and_is_recorded(kit: Any) -> None:
    alice = await kit.as_user("member")
    answer = await chat(alice, "hello", temperature=0.5)
    assert answer.status == 200, answer
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "scripted/echo"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert answer.headers["corral-model"] == "scripted/echo"
    assert answer.headers["corral-ignored"] == "temperature"
    (row,) = await calls(alice)
    assert row["id"] == answer.headers["corral-call-id"]
    assert (row["status"], row["finish_reason"], row["attempts"]) == ("completed", "stop", 1)
    assert row["output_tokens"] == body["usage"]["completion_tokens"]
    assert row["user_id"] == alice.user["id"]


@pytest.mark.one_engine
@pytest.mark.parametrize("model", ["scripted/echo", "echo", "default"])
async def test_names_of_models(kit: Any, model: str) -> None:
    answer = await chat(await kit.as_user("member"), model=model)
    assert (answer.status, answer.json().get("model")) == (200, "scripted/echo")


@pytest.mark.one_engine
async def test_unknown_models_and_fields_are_refused_with_pointers(kit: Any) -> None:
    alice = await kit.as_user("member")
    answer = await chat(alice, model="nobody/nothing")
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert answer.json()["errors"][0]["pointer"] == "/model"
    assert "scripted/echo" in answer.json()["detail"]
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert (await chat(alice, model="agent")).status == 400
    assert (await chat(alice, model="scripted/echo\r\nX-Evil: 1")).status == 400  # it would be in a header
    answer = await chat(alice, best_of=3)
    assert [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]] == [("/best_of", "unknown_field")]
    remote = [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]
    answer = await alice.post(
        "/llm/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": remote}]}
    )
    assert answer.status == 400
    assert await calls(alice) == []


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("broken", 502, "provider_error"),
        ("keyless", 502, "provider_error"),
        ("busy", 429, "rate_limited"),
        ("picky", 400, "validation_error"),
    ],
)
async def test_failures_of_the_provider(kit: Any, model: str, status: int, code: str) -> None:
    alice = await kit.as_user("member")
    answer = await chat(alice, model=f"scripted/{model}")
    assert (answer.status, answer.code) == (status, code)
    assert answer.json()["error"]["code"] == code
    (row,) = await calls(alice)
    assert (row["status"], row["error"]["code"]) == ("failed", code)
    if model == "keyless":
        assert answer.json()["kind"] == "credentials"
    if model == "busy":
        assert answer.headers["retry-after"] == "9"


@pytest.mark.one_engine
async def test_a_stream_is_server_sent_events(kit: Any) -> None:
    alice = await kit.as_user("member")
    usage: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await chat(alice, "hello streaming world", **usage)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == "hello streaming world"
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert (chunks[-1]["choices"], chunks[-1]["corral"]) == ([], {"cost_usd": 0.0})
    assert all(chunk["choices"] for chunk in chunks[:-1])
    assert {chunk["model"] for chunk in chunks} == {"scripted/echo"}
    (row,) = await calls(alice)
    assert (row["status"], row["finish_reason"]) == ("completed", "stop")
    assert row["first_token_ms"] is not None
    failed = await chat(alice, model="scripted/broken", stream=True)
    assert (failed.status, failed.code) == (502, "provider_error")


@pytest.mark.one_engine
@pytest.mark.parametrize("options", [{}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}])
async def test_no_chunk_is_without_choices_unless_usage_is_requested(kit: Any, options: dict[str, Any]) -> None:
    alice = await kit.as_user("member")
    answer = await chat(alice, "hello", stream=True, **options)
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert all(json.loads(line)["choices"] for line in lines[:-1])
    assert lines[-1] == "[DONE]"
    (row,) = await calls(alice)
    assert row["output_tokens"] > 0


@pytest.mark.one_engine
async def test_stream_options_are_refused_without_a_stream(kit: Any) -> None:
    answer = await chat(await kit.as_user("member"), stream_options={"include_usage": True})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "stream_options")


@pytest.mark.one_engine
@pytest.mark.parametrize("given", ["red", ["red", "blue"], [17, 4], [[17, 4], [17]]])
@on_the_loop_of_the_module
async def test_inputs_of_embeddings_are_texts_or_token_ids(shared_kit: Any, given: Any) -> None:
    answer = await (await shared_kit.as_user("member")).post(
        "/llm/embeddings", {"model": "scripted/words", "input": given}
    )
    assert answer.status == 200, answer
    assert len(answer.json()["data"]) == (2 if isinstance(given[0], list) or given == ["red", "blue"] else 1)
    assert answer.json()["usage"]["prompt_tokens"] > 0


@pytest.mark.one_engine
@pytest.mark.parametrize("given", [[], [[]], ["red", 4], [4, "red"], ["red", [4]], [[4], 4], [-1], ["x"] * 257])
@on_the_loop_of_the_module
async def test_other_inputs_are_refused(shared_kit: Any, given: Any) -> None:
    answer = await (await shared_kit.as_user("member")).post(
        "/llm/embeddings", {"model": "scripted/words", "input": given}
    )
    assert (answer.status, answer.json()["error"]["param"].split(".")[0]) == (400, "input")


async def test_idempotency_asks_the_model_once(kit: Any) -> None:
    alice = await kit.as_user("member")
    first = await chat(alice, headers={"Idempotency-Key": "k1"})
    again = await chat(alice, headers={"Idempotency-Key": "k1"})
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == first.json()
    assert len(await calls(alice)) == 1


async def test_many_slow_calls_run_side_by_side(kit: Any) -> None:
    alice = await kit.as_user("member")
    async with within(4):
        answers = await asyncio.gather(*[chat(alice, model="scripted/slow") for _ in range(20)])
    assert {answer.status for answer in answers} == {200}


@pytest.mark.one_engine
async def test_a_call_takes_no_longer_than_the_setting(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"scripts": SCRIPTS}})
    shorten(kit, 0.2)
    alice = await kit.as_user("member")
    answer = await chat(alice, model="scripted/hangs")
    assert (answer.status, answer.code) == (504, "upstream_timeout")
    (row,) = await calls(alice)
    assert row["error"]["code"] == "upstream_timeout"


async def test_unit_of_work_12_a_call_is_settled_when_its_caller_leaves(kit: Any) -> None:
    alice = await kit.as_user("member")
    task = asyncio.create_task(chat(alice, model="scripted/hangs"))
    for _ in range(1000):
        await asyncio.sleep(0.02)
        if await calls(alice):
            break
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(1000):
        await asyncio.sleep(0.02)
        (row,) = await calls(alice)
        if row["status"] != "in_flight":
            break
    assert row["status"] == "cancelled"


async def test_unit_of_work_12_a_sweep_settles_orphans(kit: Any) -> None:
    from corral import clock
    from corral_plugins.llm.models import LlmCall
    from corral_plugins.llm.service import calls as rows

    alice = await kit.as_user("member")
    await chat(alice)
    await kit.kernel.database.work(lambda: LlmCall.update(status="in_flight").execute())
    assert await kit.kernel.database.work(lambda: rows.fail_abandoned(660)) == 0
    clock.travel(700)
    assert await kit.kernel.database.work(lambda: rows.fail_abandoned(660)) == 1


@pytest.mark.one_engine
async def test_models_and_providers_and_their_visibility(kit: Any) -> None:
    alice, viewer = await kit.as_user("member"), await kit.as_user("viewer")
    models = (await viewer.get("/llm/models")).json()
    assert models["object"] == "list"
    assert {"scripted/echo", "scripted/three", "scripted/words"} <= {item["id"] for item in models["data"]}
    providers = (await viewer.get("/llm/providers")).json()
    found = {item["name"]: (item["kind"], item["configured"]) for item in providers["items"]}
    assert found["scripted"] == ("scripted", True)
    assert found["openai"] == ("openai", False)  # a preset
    assert set(providers["items"][0]) == {"name", "kind", "enabled", "configured", "breaker", "models"}
    assert (await chat(viewer)).status == 403
    assert (await kit.client.get("/llm/models")).status == 401
    await chat(alice)
    assert await calls(viewer) == []
    assert len(await calls(await kit.as_user("admin"))) == 1


@pytest.mark.one_engine
async def test_embeddings_as_floats_and_as_base64(kit: Any) -> None:
    alice = await kit.as_user("member")
    body = {"model": "scripted/words", "input": ["red fox", "blue sky"], "dimensions": 64}
    answer = await alice.post("/llm/embeddings", body)
    assert answer.status == 200, answer
    first = answer.json()["data"][0]["embedding"]
    assert len(first) == 64
    packed = (await alice.post("/llm/embeddings", {**body, "encoding_format": "base64"})).json()["data"][0]["embedding"]
    assert struct.unpack("<64f", base64.b64decode(packed)) == pytest.approx(first)


@pytest.mark.one_engine
async def test_an_invalid_script_fails_the_plugin(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"scripts": {"bad": {"turns": []}}}})
    assert kit.loaded("llm").state == "failed"
    assert "llm.scripts.bad" in kit.loaded("llm").reason
