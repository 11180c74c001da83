"""Credentials appear nowhere: not upstream, nor in responses, streams, logs or the database."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up

from corral.database.unit import current
from corral.redact.redactor import Redactor
from corral_plugins.llm.service.streams import StreamRedaction


@pytest.fixture
async def kit(make_kit: Callable[..., Any], providers: dict[str, Any]) -> Any:
    config = {"plugins.llm": {"providers": providers}, "settings.llm.store_payloads": "all"}
    return await make_kit(plugins=["cost", "llm"], config=config)


@pytest.mark.one_engine
@pytest.mark.parametrize("reason", [up.KEY, "correct_horse_battery"])
async def test_a_finish_reason_is_a_word_and_no_credential(kit: Any, upstream: Any, reason: str) -> None:
    kit.kernel.redactor.set_values("test", {"reason": "correct_horse_battery"})
    choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": reason}
    upstream.behaviours = [up.says("yes", choices=[choice])]
    alice = await kit.as_user("member")
    body = {"model": "up/m1", "messages": [{"role": "user", "content": "is it?"}]}
    assert (await alice.post("/llm/chat/completions", body)).status == 200
    assert reason not in await kit.kernel.database.work(_stored, read=True)


async def test_llm_6_a_known_value_appears_nowhere(kit: Any, upstream: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    alice = await kit.as_user("member")
    half = len(up.KEY) // 2
    tool = {"id": "t1", "type": "function", "function": {"name": "say", "arguments": json.dumps({"key": up.KEY})}}
    body = {
        "model": "up/m1",
        "messages": [
            {"role": "user", "content": f"My key is {up.KEY}, do not tell."},
            {"role": "assistant", "content": None, "tool_calls": [tool]},
            {"role": "tool", "tool_call_id": "t1", "content": f"<{up.KEY}>"},
        ],
    }
    upstream.behaviours = [
        up.says(f"It is {up.KEY}!"),
        up.streams("It is ", up.KEY[:half], up.KEY[half:], "!"),
        up.streams(*f"It is {up.KEY}!"),
    ]
    whole = await alice.post("/llm/chat/completions", body)
    assert whole.json()["choices"][0]["message"]["content"] == "It is [redacted]!"
    for _ in range(2):
        streamed = await alice.post("/llm/chat/completions", {**body, "stream": True})
        chunks = [json.loads(line[6:]) for line in streamed.body.decode().split("\n\n") if line.startswith("data: {")]
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert text == "It is [redacted]!"
        assert up.KEY not in streamed.body.decode()
    assert [up.KEY in json.dumps(request.body) for request in upstream.requests] == [False] * 3
    assert "My key is [redacted], do not tell." in json.dumps(upstream.requests[0].body)
    (call, *_) = (await alice.get("/llm/calls")).json()["items"]
    payload = (await alice.get(f"/llm/calls/{call['id']}")).json()["payload"]
    assert payload["response"]["content"] == "It is [redacted]!"
    assert up.KEY not in caplog.text
    assert up.KEY not in await kit.kernel.database.work(_stored, read=True)


def _stored() -> str:
    """Return the whole contents of the database; joins a unit."""
    engine = current().database.engine
    rows = [row for table in engine.get_tables() for row in engine.execute_sql(f'SELECT * FROM "{table}"').fetchall()]
    assert len(rows) > 10
    return repr(rows)


def test_arguments_of_tool_calls_are_redacted_over_chunks_too() -> None:
    redactor = Redactor()
    redactor.set_values("test", {"one": up.KEY})
    redaction = StreamRedaction(redactor)
    said = ""
    for part in ('{"key": "', up.KEY[:7], up.KEY[7:], '"}'):
        delta = {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}
        for chunk in redaction.redact_chunk({"choices": [{"index": 0, "delta": delta}]}):
            said += chunk["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"]
    for chunk in redaction.redact_chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}):
        for call in chunk["choices"][0]["delta"].get("tool_calls", ()):
            said += call["function"]["arguments"]
    assert said == '{"key": "[redacted]"}'


def test_logprobs_do_not_reveal_redacted_text() -> None:
    redactor = Redactor()
    redactor.set_values("test", {"one": up.KEY})
    redaction = StreamRedaction(redactor)
    for part, kept in (("fine ", True), (up.KEY[:9], False), (up.KEY[9:], False)):
        choice = {"index": 0, "delta": {"content": part}, "logprobs": {"content": [{"token": part}]}}
        (chunk,) = redaction.redact_chunk({"choices": [choice]})
        assert ("logprobs" in chunk["choices"][0]) is kept


def test_held_back_text_is_sent_before_the_end() -> None:
    redactor = Redactor()
    redactor.set_values("test", {"one": up.KEY})
    redaction = StreamRedaction(redactor)
    first = list(redaction.redact_chunk({"choices": [{"index": 0, "delta": {"content": f"a {up.KEY[:9]}"}}]}))
    assert [chunk["choices"][0]["delta"]["content"] for chunk in first] == ["a "]
    rest, end = redaction.redact_chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    assert rest["choices"][0]["delta"]["content"] == up.KEY[:9]
    assert end["choices"][0]["finish_reason"] == "stop"


def test_the_last_text_keeps_its_position() -> None:
    redactor = Redactor()
    redactor.set_values("test", {"one": up.KEY})
    redaction = StreamRedaction(redactor)
    call = {"index": 0, "id": "t", "function": {"name": "look", "arguments": f'{{"a": "{up.KEY[:5]}'}}
    delta = {"content": f"The capital is {up.KEY[:9]}", "tool_calls": [call]}
    chunks = list(redaction.redact_chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}]}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == f"The capital is {up.KEY[:9]}"
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(call["arguments"] for call in calls) == f'{{"a": "{up.KEY[:5]}'
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]


def test_whole_fields_are_redacted_as_well() -> None:
    redactor = Redactor()
    redactor.set_values("test", {"one": up.KEY})
    call = {"index": 0, "id": up.KEY, "function": {"name": up.KEY, "arguments": ""}}
    delta = {"annotations": [{"url_citation": {"url": f"https://x.test/{up.KEY}"}}], "tool_calls": [call]}
    (chunk,) = StreamRedaction(redactor).redact_chunk(
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    )
    assert up.KEY not in json.dumps(chunk)


def _events(answer: Any) -> list[dict[str, Any]]:
    lines = answer.body.decode().split("\n\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def _text(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def _fails(exchange: up.Exchange) -> None:
    await up.streams("It is ", up.KEY[:9], end=False)(exchange)
    await exchange.event({"error": {"message": "the model broke", "type": "server_error"}})


async def _stands_still(exchange: up.Exchange) -> None:
    await up.streams("It is ", up.KEY[:9], end=False)(exchange)
    await up.hangs(exchange)


@pytest.mark.one_engine
@pytest.mark.parametrize(("behave", "code"), [(_fails, "provider_error"), (_stands_still, "upstream_timeout")])
async def test_held_back_text_is_sent_before_an_error(kit: Any, upstream: Any, behave: up.Behaviour, code: str) -> None:
    up.shorten(kit, 1.0)
    alice = await kit.as_user("member")
    upstream.behaviours = [behave]
    body = {"model": "up/m1", "messages": [{"role": "user", "content": "Well?"}], "stream": True}
    answer = await alice.post("/llm/chat/completions", body)
    *chunks, last = _events(answer)
    assert last["error"]["code"] == code
    assert _text(chunks) == f"It is {up.KEY[:9]}"
    assert "[DONE]" not in answer.body.decode()
