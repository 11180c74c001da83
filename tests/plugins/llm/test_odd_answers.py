"""Undocumented provider responses: nothing crashes, nothing is charged twice, and every charge is recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up
from tests.plugins.llm.test_hooks import Parrot
from tests.plugins.llm.test_openai_kind import chat, chunks_of

from corral.errors import Unavailable
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Client
from corral_plugins.llm.api import LLMProvider, ProviderConnection
from corral_plugins.llm.models import LlmSlot
from corral_plugins.llm.service.gateway import Gateway
from corral_plugins.llm.service.settlement import ProviderStates
from corral_plugins.llm.service.streams import StreamRedaction

pytestmark = pytest.mark.one_engine

THINKING = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
    {"type": "text", "text": f"Okay {up.KEY}"},
]


@pytest.fixture
async def kit(make_kit: Callable[..., Any], providers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """One provider with up to two retries."""
    monkeypatch.setattr("corral_plugins.llm.service.dispatch.retry_delay", lambda tries, failure: 0.0)
    providers["up"]["max_retries"] = 2
    return await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})


async def ended(kit: Any, client: Client) -> tuple[Any, list[Any]]:
    """Return the only call, after checking that it holds no slot, and its cost events."""
    (row,) = (await client.get("/llm/calls")).json()["items"]
    assert await kit.kernel.database.work(LlmSlot.select().count, read=True) == 0
    return row, (await client.get("/cost/events")).json()["items"]


def answers(body: Any, **more: Any) -> up.Behaviour:
    async def behave(exchange: up.Exchange) -> None:
        await exchange.json(body, **more)

    return behave


def streams(*chunks: Any, done: bool = True) -> up.Behaviour:
    """Stream these chunks unchanged."""

    async def behave(exchange: up.Exchange) -> None:
        await exchange.begin()
        for each in chunks:
            await exchange.event(each)
        if done:
            await exchange.event("[DONE]")

    return behave


def text_of(chunks: list[Any], name: str = "content") -> str:
    return "".join(choice["delta"].get(name) or "" for each in chunks[:-1] for choice in each["choices"])


@pytest.mark.parametrize(
    ("finish", "shown"),
    [
        ("function_call_filter: MALFORMED_FUNCTION_CALL",) * 2,
        ("st\0p", "st\ufffdp"),
        ({"type": "stop"}, "stop"),
        (None, None),
    ],
)
async def test_any_finish_reason_is_settled(kit: Any, upstream: Any, finish: Any, shown: str | None) -> None:
    alice, answer = await kit.as_user("member"), up.completion("x")
    answer["choices"][0]["finish_reason"] = finish
    upstream.otherwise = answers(answer)
    assert (await chat(alice)).json()["choices"][0]["finish_reason"] == shown
    row, events = await ended(kit, alice)
    assert (row["status"], row["finish_reason"], len(events)) == ("completed", shown and shown[:40], 1)


async def test_odd_token_counts_are_normalized(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    usage = {
        "prompt_tokens": 100.0,
        "completion_tokens": 5.0,
        "total_tokens": None,
        "prompt_tokens_details": "none",
        "cost": "0.25",
        "note": up.KEY,
    }
    upstream.otherwise = answers(up.completion("x", usage=usage))
    answer = await chat(alice)
    assert answer.json()["usage"] == {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}
    row, (event,) = await ended(kit, alice)
    assert (row["input_tokens"], event["output_tokens"], event["cost_usd"]) == (100, 5, 0.25)


async def test_content_in_parts_becomes_text_and_reasoning(kit: Any, upstream: Any) -> None:
    alice, whole = await kit.as_user("member"), up.completion("")
    whole["choices"][0]["message"]["content"] = THINKING
    begun, ended_ = up.chunk("So: "), up.chunk(None, "stop")
    begun["choices"].append({"index": 0, "delta": {"content": THINKING, "made_up": up.KEY}, "made_up": up.KEY})
    upstream.behaviours = [answers(whole), streams(begun, ended_, up.USAGE)]
    message = (await chat(alice)).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Okay [redacted]", "reasoning_content": "hm"}
    answer = await chat(alice, stream=True)
    chunks = chunks_of(answer)
    assert (text_of(chunks), text_of(chunks, "reasoning_content")) == ("So: Okay [redacted]", "hm")
    assert up.KEY not in answer.body.decode()


@pytest.mark.parametrize("content", [7, {"text": "x"}])
@pytest.mark.parametrize("stream", [False, True])
async def test_content_that_is_not_text_is_charged_once(kit: Any, upstream: Any, stream: bool, content: Any) -> None:
    alice, whole, chunk = await kit.as_user("member"), up.completion(""), up.chunk("")
    whole["choices"][0]["message"]["content"] = chunk["choices"][0]["delta"]["content"] = content
    upstream.otherwise = streams(up.chunk("a "), chunk) if stream else answers(whole)
    answer = await chat(alice, stream=stream)
    error = chunks_of(answer)[-1]["error"] if stream else answer.json()["error"]
    assert error["code"] == "provider_error"
    row, events = await ended(kit, alice)
    assert (row["status"], len(events), len(upstream.requests)) == ("failed", 1, 1)


async def test_unexpected_headers_and_texts(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    upstream.behaviours = [up.refuses(429, retry_after="inf")] * 3
    answer = await chat(alice)
    assert (answer.status, answer.headers["retry-after"]) == (429, "86400")
    upstream.behaviours = [answers(b'{"error": {"message": "half \\ud83d"}}', status=400)]
    answer = await chat(alice)
    assert (answer.status, answer.json()["detail"]) == (400, "up: half \ufffd")
    upstream.behaviours = [answers(b"[" * 60_000, status=400)]
    assert (await chat(alice)).status == 400
    assert (await chat(alice, "scripted/x", metadata={"script": "[" * 100_000})).status == 400
    upstream.behaviours = [answers(b"[" * 60_000)]
    assert (await chat(alice)).code == "provider_error"


class Broken(Parrot):
    """A kind of provider with a bug."""

    async def complete(self, request: dict[str, Any], connection: ProviderConnection) -> dict[str, Any]:
        raise ZeroDivisionError

    async def stream(
        self, request: dict[str, Any], connection: ProviderConnection
    ) -> AsyncGenerator[dict[str, Any], None]:
        yield up.chunk("half, ")
        raise ZeroDivisionError


class BrokenPlugin(Plugin):
    """Contributes a kind with a bug."""

    name = "broken"
    wants = ("llm",)

    @hookimpl(optionalhook=True)
    def corral_llm_providers(self) -> Iterable[LLMProvider]:
        return [Broken()]


async def test_a_bug_in_a_kind_is_a_provider_error(make_kit: Callable[..., Any]) -> None:
    providers = {"pirate": {"kind": "parrot", "word": "ahoy"}}
    kit = await make_kit(plugins=["cost", "llm", BrokenPlugin], config={"plugins.llm": {"providers": providers}})
    alice = await kit.as_user("member")
    answer = await chat(alice, "pirate/polly")
    assert (answer.status, answer.code) == (502, "provider_error")
    (row,) = (await alice.get("/llm/calls")).json()["items"]
    assert row["attempts"] == 1
    chunks = chunks_of(await chat(alice, "pirate/polly", stream=True))
    assert (chunks[0]["choices"][0]["delta"]["content"], chunks[-1]["error"]["code"]) == ("half, ", "provider_error")


async def test_a_bug_of_the_gateway_ends_a_stream_with_an_error(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, feed = await kit.as_user("member"), StreamRedaction.redact_chunk

    def fails(self: StreamRedaction, chunk: dict[str, Any]) -> Any:
        if "upstream" in json.dumps(chunk):
            raise ZeroDivisionError
        return feed(self, chunk)

    monkeypatch.setattr(StreamRedaction, "redact_chunk", fails)
    chunks = chunks_of(await chat(alice, stream=True))
    assert chunks[-1]["error"]["code"] == "internal"
    row, events = await ended(kit, alice)
    assert (row["status"], len(events)) == ("failed", 1)


# -- settling


async def test_a_busy_database_loses_no_cost(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, gateway = await kit.as_user("member"), kit.kernel.container.get(Gateway)
    work, units = gateway._work, 0

    async def busy(*args: Any, **kwargs: Any) -> Any:
        nonlocal units
        units += 1
        if units in (2, 3):
            raise Unavailable("The database is busy.", code="overloaded")
        return await work(*args, **kwargs)

    monkeypatch.setattr("corral_plugins.llm.service.gateway.SETTLE_RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(gateway, "_work", busy)
    assert (await chat(alice)).status == 200
    row, events = await ended(kit, alice)
    assert (row["status"], len(events)) == ("completed", 1)


async def test_an_outcome_that_cannot_be_stored_is_still_charged(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: ProviderStates, outcome: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ProviderStates, "record_outcome", fails)
    alice = await kit.as_user("member")
    assert (await chat(alice)).status == 500
    row, (event,) = await ended(kit, alice)
    assert (row["status"], row["error"]["code"], event["input_tokens"]) == ("failed", "internal", 11)


# -- streams that end early


async def test_an_unfinished_stream_is_an_error(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    upstream.behaviours = [up.streams("half of the ", "text, ", end=False)]
    body = {"model": "up/m1", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    key = {"idempotency-key": "once"}
    chunks = chunks_of(await alice.post("/llm/chat/completions", body, headers=key))
    assert (chunks[-2]["choices"][0]["delta"]["content"], chunks[-1]["error"]["code"]) == ("text, ", "provider_error")
    row, (event,) = await ended(kit, alice)
    assert (row["status"], event["estimated"]) == ("failed", True)
    again = chunks_of(await alice.post("/llm/chat/completions", body, headers=key))
    assert text_of(again) == "hellofromupstream"
    assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    "chunks", [[up.chunk("x", "stop")], [up.chunk("x"), "[DONE]"], [up.chunk("x", error=None), "[DONE]"]]
)
async def test_a_finish_reason_or_done_ends_a_stream(kit: Any, upstream: Any, chunks: list[Any]) -> None:
    upstream.otherwise = streams(*chunks, done=False)
    found = chunks_of(await chat(await kit.as_user("member"), stream=True))
    assert (text_of(found), found[-1]) == ("x", "[DONE]")


async def test_errors_in_a_response_with_status_200(kit: Any, upstream: Any) -> None:
    alice = await kit.as_user("member")
    told = {"object": "error", "message": "out of memory", "type": "InternalServerError", "code": 500}
    upstream.otherwise = streams(up.chunk("half "), told)
    error = chunks_of(await chat(alice, stream=True))[-1]["error"]
    assert (error["code"], error["message"]) == ("provider_error", "up: out of memory")
    upstream.otherwise = up.says("hello")
    for stream in (False, True):
        for refusal in (told, {"error": {"message": "slow down", "code": 429}}):
            upstream.behaviours = [streams(refusal) if stream else answers(refusal)]
            answer = await chat(alice, stream=stream)  # nothing had begun, so it is asked again
            assert answer.status == 200, answer


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
async def test_only_line_feeds_end_a_line(kit: Any, upstream: Any, separator: str) -> None:
    text = f"one{separator}two"
    raw = json.dumps(up.chunk("TEXT"), ensure_ascii=False).replace("TEXT", text if separator > "\x1f" else "one two")
    upstream.otherwise = streams(raw, up.chunk(" after", "stop"), up.USAGE)
    found = chunks_of(await chat(await kit.as_user("member"), stream=True))
    assert text_of(found) == (text if separator > "\x1f" else "one two") + " after"


async def test_lines_may_be_split_but_are_limited_in_length(
    kit: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, data = await kit.as_user("member"), f"data: {json.dumps(up.chunk('whole', 'stop'))}\r\n\r\n".encode()

    async def pieces(exchange: up.Exchange) -> None:
        await exchange.begin()
        for at in range(0, len(data), 40):
            exchange._writer.write(data[at : at + 40])
            await exchange._writer.drain()
            await asyncio.sleep(0.005)

    upstream.otherwise = pieces
    assert text_of(chunks_of(await chat(alice, stream=True))) == "whole"
    monkeypatch.setattr("corral_plugins.llm.providers.http.MAX_LINE_BYTES", 60)
    assert (await chat(alice, stream=True)).code == "provider_error"


# -- what was paid is not asked for again


@pytest.mark.parametrize("how", ["cut", "no JSON", "no choices"])
async def test_a_charged_response_is_not_requested_again(kit: Any, upstream: Any, how: str) -> None:
    alice = await kit.as_user("member")
    body = json.dumps({**up.completion("x"), **({"choices": []} if how == "no choices" else {})}).encode()

    async def breaks(exchange: up.Exchange) -> None:
        sent = body[:-9] if how == "no JSON" else body
        length = len(sent) + (9 if how == "cut" else 0)
        exchange._writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n".encode() + sent)
        await exchange._writer.drain()

    upstream.otherwise = breaks
    assert (await chat(alice)).code == "provider_error"
    row, (event,) = await ended(kit, alice)
    assert (row["attempts"], len(upstream.requests)) == (1, 1)
    assert (event["output_tokens"], event["estimated"]) == ((7, False) if how == "no choices" else (0, True))


async def test_a_connection_that_breaks_before_the_response_is_retried(kit: Any, upstream: Any) -> None:
    async def leaves(exchange: up.Exchange) -> None: ...

    alice = await kit.as_user("member")
    upstream.behaviours = [leaves]
    assert (await chat(alice)).status == 200
    row, events = await ended(kit, alice)
    assert (row["attempts"], len(events)) == (2, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_timed_out_may_charge(
    make_kit: Callable[..., Any], upstream: Any, providers: dict[str, Any], stream: bool
) -> None:
    providers["up"] |= {"timeouts": {"first_token_seconds": 1, "total_seconds": 1}}
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})
    alice = await kit.as_user("member")
    upstream.otherwise = up.hangs
    assert (await chat(alice, stream=stream)).code == "upstream_timeout"
    row, (event,) = await ended(kit, alice)
    assert (row["status"], event["input_tokens"] > 0, event["estimated"]) == ("failed", True, True)
