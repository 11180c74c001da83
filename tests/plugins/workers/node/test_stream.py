"""Streamed replies: the progress that people see, and how streams end."""

from __future__ import annotations

import asyncio
import importlib
import time

import httpx2
import pytest
from tests.limits import within
from tests.plugins.workers.node.recorded import Refusal, Server, Stream, calls_tool, claim

from corral_plugins.workers.node.task_process import CANCELLED, LOST, REPORTED

LOOP = "corral_plugins.workers.node.agent_loop"  # by name: it imports the SDK, for two seconds
WORDS = [f"word{n} " for n in range(200)]


async def test_the_text_is_told_as_it_comes_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LOOP}.LIVE_SECONDS", 0.05)
    server = Server(Stream(*WORDS, seconds=0.002))
    began = time.monotonic()
    assert await server.run(claim()) == REPORTED
    *told, last = [message["message"] for message in server.of("progress")]
    assert last == "Step 1 of at most 5"
    assert 2 <= len(told) <= (time.monotonic() - began) / 0.05
    whole = "".join(WORDS)
    longest = importlib.import_module(LOOP).LIVE_LENGTH
    assert all(message.removeprefix("… ") in whole and len(message) <= longest for message in told)
    assert all(message.startswith(("word0 ", "… word")) for message in told)
    assert told[-1].startswith("… word")
    assert len({*told}) == len(told)
    assert server.of("complete") == [{"text": whole}]


@pytest.mark.parametrize(
    ("text", "whole"),
    [("Th", ""), ("The rep", "The "), ("The report ", "The report "), ("x" * 50, "x" * 50), (" ", "")],
)
def test_progress_has_no_half_words(text: str, whole: str) -> None:
    assert importlib.import_module(LOOP)._whole_words(text) == whole


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("a" * 500, "a" * 500),
        (f"crews {'b ' * 248}", f"… {'b ' * 248}"),
        (f"in {'b ' * 250}", f"… {'b ' * 249}"),
        (f"crews{' b' * 249}", f"… b{' b' * 248}"),
        ("x" * 501, f"… {'x' * 498}"),
    ],
)
def test_a_cut_text_begins_with_a_word(text: str, end: str) -> None:
    assert importlib.import_module(LOOP)._end_of(text) == end


async def test_a_short_answer_is_told_once_it_is_there() -> None:
    server = Server("short")
    await server.run(claim())
    assert [message["message"] for message in server.of("progress")] == ["Step 1 of at most 5"]


@pytest.mark.parametrize(("state", "status"), [("cancel_requested", CANCELLED), ("lost", LOST)])
async def test_what_the_server_wants_is_heard_in_the_middle(
    state: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{LOOP}.LIVE_SECONDS", 0.02)
    server = Server(Stream(*WORDS, seconds=0.05))
    server.states = ["ok", state]
    async with within(5):
        assert await server.run(claim()) == status
    assert server.streams_closed == 1
    assert server.of("checkpoint") == []


async def test_a_cancelled_process_closes_the_stream() -> None:
    server = Server(Stream(*WORDS, seconds=0.05))
    running = asyncio.ensure_future(server.run(claim()))
    while "chat" not in server.names:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with within(5):  # of ten
            await running
    assert server.streams_closed == 1


async def test_a_message_that_is_not_taken_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LOOP}.LIVE_SECONDS", 0.01)
    server = Server(Stream(*WORDS[:10], seconds=0.02))
    refusals = [Refusal(503, code="overloaded")]

    def refuse(name: str) -> None:
        if name == "progress" and refusals:
            raise refusals.pop()

    server.before = refuse
    assert await server.run(claim()) == REPORTED
    assert not refusals
    assert server.of("complete") == [{"text": "".join(WORDS[:10])}]


async def test_an_answer_that_was_cut_is_asked_for_again_under_its_key() -> None:
    server = Server(Stream("half an ans", cut=True), "whole")
    assert await server.run(claim()) == REPORTED
    assert [asked["key"] for asked in server.of("chat")] == ["t1:1", "t1:1"]
    assert server.of("complete") == [{"text": "whole"}]


async def test_an_answer_that_is_cut_every_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_plugins.workers.node.client.retry_delay", lambda tries, error: 0.0)
    server = Server(*[Stream("half an ans", cut=True)] * 10)
    assert await asyncio.wait_for(server.run(claim()), 30) == REPORTED
    assert len(server.of("chat")) == 6
    (failure,) = server.of("fail")
    assert (failure["type"], failure["retryable"]) == ("provider_error", True)
    assert "was incomplete 6 times" in failure["message"]


async def test_a_server_that_is_not_there_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_plugins.workers.node.client.retry_delay", lambda tries, error: 0.0)
    server, tries = Server("whole"), 0

    def refuse(name: str) -> None:
        nonlocal tries
        tries += name == "chat"
        if name == "chat" and tries <= 20:
            raise httpx2.ConnectError("nobody listens")

    server.before = refuse
    assert await server.run(claim()) == REPORTED
    assert server.of("complete") == [{"text": "whole"}]


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("provider_error", {"fail": [{"type": "provider_error", "message": "It broke.", "retryable": True}]}),
        ("upstream_timeout", {"fail": [{"type": "provider_error", "message": "It broke.", "retryable": True}]}),
        ("kill_switch", {"release": ["kill_switch"]}),
        ("lease_lost", {}),
    ],
)
async def test_an_error_after_the_first_piece(code: str, ends: dict[str, object]) -> None:
    error = {"message": "It broke.", "type": "server_error", "code": code, "param": None}
    server = Server(Stream("half", error=error))
    assert await server.run(claim()) == (REPORTED if ends else LOST)
    assert {name: server.of(name) for name in ("fail", "release", "complete") if server.of(name)} == ends


async def test_what_the_gateway_asks_to_wait_for_is_asked_again() -> None:
    server = Server(Refusal(409, code="idempotency_in_progress"), Refusal(503, code="shutting_down"), "ok")
    assert await server.run(claim()) == REPORTED
    assert {asked["key"] for asked in server.of("chat")} == {"t1:1"}


async def test_calls_without_a_usable_id_get_one_of_their_step() -> None:
    nameless = calls_tool("x")
    nameless["tool_calls"][0]["id"] = ""
    server = Server(calls_tool("x"), calls_tool("x"), nameless, "end")
    assert await server.run(claim()) == REPORTED
    assert [call[1] for call in server.of("tool")] == ["c-x", "step_2_0", "step_3_0"]


async def test_the_request_is_what_the_gateway_takes() -> None:
    tool = {"name": "a.b", "title": "t", "description": "Does it.", "schema": {"type": "object", "properties": {}}}
    server = Server("ok")
    await server.run(claim(agent={"tools": [tool], "config": {"temperature": 0, "max_tokens": 50}}))
    body = server.of("chat")[0]["body"]
    assert (body["model"], body["stream"], body["temperature"]) == ("agent", True, 0)
    assert body["stream_options"] == {"include_usage": True}
    assert not {"max_tokens", "max_completion_tokens"} & body.keys()  # the gateway applies the agent's limit
    assert body["tools"] == [
        {
            "type": "function",
            "function": {"name": "a__b", "description": "Does it.", "parameters": tool["schema"]},
        }
    ]
    server = Server("ok")
    await server.run(claim())
    assert not {"tools", "tool_choice", "temperature", "max_tokens"} & server.of("chat")[0]["body"].keys()


async def test_control_tokens_of_models_in_data_are_no_tokens() -> None:
    """The model receives such texts unchanged, and they come back unchanged."""
    server = Server("<|im_start|>system")
    await server.run(claim(instructions="Explain <|im_start|>system"))
    (sent,) = [each["content"] for each in server.of("chat")[0]["body"]["messages"] if each["role"] == "user"]
    assert "<|im_start|>" not in sent
    assert sent.replace("\u200d", "") == "Explain <|im_start|>system"
    assert server.of("complete") == [{"text": "<|im_start|>system"}]
