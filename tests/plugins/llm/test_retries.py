"""Retries, fallback models, and ending upstream requests when the client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from tests.limits import within
from tests.plugins.llm import conftest as up

from corral.testing.kit import Answer, Client
from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.service.dispatch import retry_delay

pytestmark = pytest.mark.one_engine


@pytest.fixture
async def kit(make_kit: Callable[..., Any], providers: dict[str, Any], upstream: Any) -> Any:
    """`default` is up/m1 with the fallback spare/m1, a second provider at the same server."""
    providers["spare"] = {**providers["up"], "api_key": "sk-spare-0123456789abcdef"}
    settings = {"settings.llm.default_model": "up/m1", "settings.llm.default_fallback_models": ["spare/m1"]}
    return await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}, **settings})


async def chat(client: Client, model: str = "default", **more: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return await client.post("/llm/chat/completions", body)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without delay."""
    monkeypatch.setattr("corral_plugins.llm.service.dispatch.retry_delay", lambda tries, failure: 0.0)


@pytest.mark.usefixtures("at_once")
async def test_the_same_provider_is_retried_before_fallback(
    make_kit: Callable[..., Any], providers: dict[str, Any], upstream: Any
) -> None:
    providers["up"]["max_retries"] = 2
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": providers}})
    alice = await kit.as_user("member")
    upstream.behaviours = [up.refuses(503), up.refuses(429)]
    answer = await chat(alice, "up/m1")
    assert answer.status == 200
    assert len(upstream.requests) == 3
    upstream.behaviours = [up.refuses(400)]
    assert (await chat(alice, "up/m1")).status == 400
    assert len(upstream.requests) == 4  # what is the caller's is not repeated
    upstream.behaviours = [up.refuses(529)] * 3
    assert (await chat(alice, "up/m1")).status == 502
    rows = (await alice.get("/llm/calls")).json()["items"]
    assert [row["attempts"] for row in rows] == [3, 1, 3]


def test_retry_delays_grow_and_respect_retry_after() -> None:
    failure = ProviderError(503, "x")
    for tries, seconds in enumerate((1, 2, 4)):
        assert 0.75 * seconds <= (retry_delay(tries, failure) or 0) <= 1.25 * seconds
    assert (retry_delay(0, ProviderError(429, "x", retry_after=9)) or 0) >= 9
    assert retry_delay(0, ProviderError(429, "x", retry_after=11)) is None


@pytest.mark.parametrize("stream", [False, True])
async def test_llm_4_errors_independent_of_the_request_fall_back(kit: Any, upstream: Any, stream: bool) -> None:
    alice = await kit.as_user("member")
    for status in (401, 404, 429, 500):
        upstream.behaviours = [up.refuses(status)]
        answer = await chat(alice, stream=stream)
        assert (answer.status, answer.headers["corral-model"]) == (200, "spare/m1")
    assert upstream.requests[-1].headers["authorization"] == "Bearer sk-spare-0123456789abcdef"
    upstream.behaviours = [up.refuses(422)]
    assert (await chat(alice, stream=stream)).status == 400
    upstream.behaviours = [up.refuses(500, "first"), up.refuses(500, "last")]
    assert "last" in (await chat(alice, stream=stream)).json()["detail"]
    (first, *_) = (await alice.get("/llm/calls?status=completed")).json()["items"]
    assert (first["provider"], first["model"], first["attempts"]) == ("spare", "m1", 2)
    metrics = (await kit.client.get("/metrics", root=True)).body.decode()
    assert 'corral_llm_fallbacks_total{provider="up"} 5.0' in metrics
    assert 'corral_llm_calls_total{outcome="completed",provider="spare"}' in metrics


async def test_a_refused_key_raises_an_alert_despite_fallback(kit: Any, upstream: Any) -> None:
    admin = await kit.as_user("admin")
    upstream.behaviours = [up.refuses(401, f"{up.KEY} is no key")]
    assert (await chat(admin)).headers["corral-model"] == "spare/m1"
    (alert,) = [json.loads(event.data) for event in await kit.events() if event.type == "system.alert"]
    assert (alert["kind"], alert["object"]["id"]) == ("llm_credentials", "up")
    told = (await admin.get("/llm/providers/up")).json()["last_error"]
    assert (told["code"], told["detail"]) == ("provider_error", "up: [redacted] is no key")
    assert (await admin.get("/llm/providers/spare")).json()["last_error"] is None


@pytest.mark.usefixtures("at_once")
async def test_every_retry_counts_for_the_requests_per_minute(
    make_kit: Callable[..., Any], providers: dict[str, Any], upstream: Any
) -> None:
    providers["up"] |= {"max_retries": 5, "requests_per_minute": 2}
    config = {"plugins.llm": {"providers": providers}, "settings.llm.queue_timeout_seconds": 0}
    kit = await make_kit(plugins=["cost", "llm"], config=config)
    upstream.otherwise = up.refuses(503)
    answer = await chat(await kit.as_user("member"), "up/m1")
    assert (answer.status, answer.code) == (429, "concurrency_limit")
    assert len(upstream.requests) == 2


async def test_nothing_falls_back_after_the_first_token(kit: Any, upstream: Any) -> None:
    async def breaks(exchange: up.Exchange) -> None:
        await exchange.begin()
        await exchange.event(up.chunk("half"))

    upstream.behaviours = [breaks]
    answer = await chat(await kit.as_user("member"), stream=True)
    assert answer.status == 200
    assert len(upstream.requests) == 1


async def test_an_unconfigured_provider_is_skipped(make_kit: Callable[..., Any], upstream: Any) -> None:
    settings = {"settings.llm.default_model": "openai/gpt", "settings.llm.default_fallback_models": ["scripted/echo"]}
    kit = await make_kit(plugins=["cost", "llm"], config=settings)
    alice = await kit.as_user("member")
    assert (await chat(alice)).headers["corral-model"] == "scripted/echo"
    answer = await chat(alice, "openai/gpt")
    assert (answer.status, answer.code) == (422, "llm.provider_not_configured")
    assert (answer.headers["x-should-retry"], "retry-after" in answer.headers) == ("false", False)


@pytest.mark.parametrize("stream", [False, True])
async def test_llm_5_a_client_that_leaves_ends_the_upstream_request(
    kit: Any, upstream: Any, serve: Any, stream: bool
) -> None:
    alice, url = await kit.as_user("member"), await serve(kit)
    upstream.otherwise = up.streams("one ", *["more "] * 100, pause=0.2) if stream else up.hangs
    body = {"model": "up/m1", "messages": [{"role": "user", "content": "hi " * 50}], "stream": stream}
    headers = {"authorization": f"Bearer {alice.token}"}

    async def ask(client: httpx2.AsyncClient) -> None:
        async with client.stream("POST", f"{url}/api/v1/llm/chat/completions", json=body, headers=headers) as answer:
            async for _ in answer.aiter_bytes():
                pass

    async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
        asking = asyncio.ensure_future(ask(client))
        await asyncio.wait_for(upstream.asked(), 60)
        await asyncio.sleep(0.3)
        asking.cancel()
        await asyncio.wait({asking})
    (exchange,) = upstream.exchanges
    async with within(1):
        await exchange.gone.wait()
    row = await settled(alice)
    assert (row["status"], row["estimated"], row["input_tokens"] > 30) == ("cancelled", True, True)
    events = (await alice.get("/cost/events")).json()["items"]
    assert [event["usage_key"] for event in events] == [row["id"]]


async def settled(client: Client) -> Any:
    """Return the only call once it is settled."""
    for _ in range(2000):
        (row,) = (await client.get("/llm/calls")).json()["items"]
        if row["status"] != "in_flight":
            return row
        await asyncio.sleep(0.02)
    raise AssertionError(row)
