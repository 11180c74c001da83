"""Providers: admins create, change, test and delete them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up

from corral_plugins.llm.models import LlmProviderState

pytestmark = pytest.mark.one_engine


@pytest.fixture
async def kit(make_kit: Callable[..., Any], upstream: Any, providers: dict[str, Any]) -> Any:
    host = upstream.url.removeprefix("http://").removesuffix("/v1")
    return await make_kit(
        plugins=["cost", "agents", "llm"],
        config={"plugins.llm": {"providers": providers}, "egress.allow": [host]},
    )


@pytest.fixture
def new(upstream: Any) -> dict[str, Any]:
    return {"name": "mine", "kind": "openai", "base_url": upstream.url, "max_retries": 0, "headers": {"x-team": "a"}}


async def lists(exchange: up.Exchange) -> None:
    await exchange.json({"object": "list", "data": [{"id": "big", "max_model_len": 32000}, {"id": "text-embed-1"}]})


async def ask(client: Any, model: str) -> Any:
    return await client.post("/llm/chat/completions", {"model": model, "messages": [{"role": "user", "content": "x"}]})


async def test_a_provider_is_created_used_changed_and_deleted(kit: Any, upstream: Any, new: dict[str, Any]) -> None:
    admin, alice = await kit.as_user("admin"), await kit.as_user("member")
    made = await admin.post("/llm/providers", new)
    assert made.status == 201, made
    assert made.headers["location"] == "/api/v1/llm/providers/mine"
    view = made.json()
    assert (view["configured"], view["source"], view["version"], view["models"]) == (True, "api", 1, ["*"])
    assert (await ask(alice, "mine/anything")).status == 200
    assert upstream.requests[-1].headers["x-team"] == "a"
    assert "authorization" not in upstream.requests[-1].headers
    assert (await admin.post("/llm/providers", new)).code == "duplicate"
    changed = await admin.put("/llm/providers/mine", {"enabled": False}, headers={"If-Match": '"1"'})
    assert (changed.status, changed.headers["etag"], changed.json()["enabled"]) == (200, '"2"', False)
    assert (await admin.put("/llm/providers/mine", {"enabled": True}, headers={"If-Match": '"1"'})).status == 412
    assert (await ask(alice, "mine/anything")).code == "llm.provider_not_configured"
    assert (await admin.delete("/llm/providers/mine")).status == 204
    assert (await admin.delete("/llm/providers/mine")).status == 404
    assert (await ask(alice, "mine/anything")).code == "model_not_found"
    told = [event for event in await kit.events() if event.type == "llm.provider_changed"]
    assert [event.visibility for event in told] == ["admin"] * 3


async def test_only_admins_manage_providers_and_members_see_few_fields(kit: Any, new: dict[str, Any]) -> None:
    alice, admin = await kit.as_user("member"), await kit.as_user("admin")
    for answer in (
        await alice.post("/llm/providers", new),
        await alice.get("/llm/providers/up"),
        await alice.put("/llm/providers/up", {}),
        await alice.delete("/llm/providers/up"),
        await alice.post("/llm/providers/up/test", {}),
        await alice.post("/llm/providers/up/refresh"),
    ):
        assert answer.status == 403
        assert answer.json()["error"]["type"] == "permission_error"
    (seen,) = [item for item in (await alice.get("/llm/providers")).json()["items"] if item["name"] == "up"]
    assert set(seen) == {"name", "kind", "enabled", "configured", "breaker", "models"}
    (seen,) = [item for item in (await admin.get("/llm/providers")).json()["items"] if item["name"] == "up"]
    assert seen["source"] == "file"
    assert up.KEY not in (await admin.get("/llm/providers/up")).body.decode()


async def test_providers_of_the_file_are_changed_there(kit: Any) -> None:
    admin = await kit.as_user("admin")
    for answer in (
        await admin.put("/llm/providers/up", {"enabled": False}),
        await admin.delete("/llm/providers/up"),
        await admin.post("/llm/providers", {"name": "up", "kind": "openai", "base_url": "https://example.org"}),
    ):
        assert (answer.status, answer.code) == (409, "setting_locked")


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"kind": "nonsense"}, "/kind"),
        ({"base_url": None}, "/base_url"),
        ({"name": "No Name"}, "/name"),
        ({"headers": {"Authorization": "x"}}, "/headers/Authorization"),
        ({"max_retries": 9}, "/max_retries"),
        ({"headers": {"X-Auth-Token": "x"}}, "/headers/X-Auth-Token"),
        ({"headers": {"Host": "x"}}, "/headers/Host"),
        ({"headers": {"x-goog-api-key": "x"}}, "/headers/x-goog-api-key"),
        ({"base_url": "https://example.org/v1?key=abc"}, "/base_url"),
        ({"base_url": "ftp://example.org"}, "/base_url"),
        ({"timeouts": {"idle_seconds": 0}}, "/timeouts/idle_seconds"),
        ({"models": [{"id": ""}]}, "/models/0"),
        ({"surprise": 1}, "/surprise"),
    ],
)
async def test_invalid_providers_are_refused(
    kit: Any, new: dict[str, Any], change: dict[str, Any], pointer: str
) -> None:
    answer = await (await kit.as_user("admin")).post("/llm/providers", {**new, **change})
    assert answer.status == 400, answer
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_headers_without_credentials_are_accepted(kit: Any, new: dict[str, Any]) -> None:
    headers = {"OpenAI-Organization": "org-1", "anthropic-version": "2023-06-01", "X-Keyboard": "qwerty"}
    answer = await (await kit.as_user("admin")).post("/llm/providers", {**new, "headers": headers})
    assert (answer.status, answer.json()["headers"]) == (201, headers)


async def test_keys_need_the_vault(kit: Any, new: dict[str, Any]) -> None:
    admin = await kit.as_user("admin")
    for key in ({"api_key": "sk-x"}, {"api_key_secret": "openai"}):
        answer = await admin.post("/llm/providers", {**new, **key})
        assert (answer.status, answer.code) == (503, "plugin_disabled")


async def test_a_preset_can_be_configured_and_reset(kit: Any, upstream: Any) -> None:
    admin = await kit.as_user("admin")
    assert (await admin.delete("/llm/providers/ollama")).code == "setting_locked"
    changed = await admin.put("/llm/providers/ollama", {"base_url": upstream.url})
    assert changed.status == 200, changed
    assert (changed.json()["source"], changed.json()["configured"], changed.json()["version"]) == ("api", True, 1)
    assert (await admin.put("/llm/providers/groq", {"max_retries": 1})).json()["configured"] is False
    assert (await admin.delete("/llm/providers/ollama")).status == 204
    again = (await admin.get("/llm/providers/ollama")).json()
    assert (again["source"], again["configured"]) == ("preset", False)


async def test_models_are_fetched_and_stored(kit: Any, upstream: Any, new: dict[str, Any]) -> None:
    upstream.otherwise = lists
    admin = await kit.as_user("admin")
    await admin.post("/llm/providers", new)
    assert await kit.run_jobs() == 1  # soon after it was made
    view = (await admin.get("/llm/providers/mine")).json()
    assert view["listed_models"] == ["big", "text-embed-1"]
    assert view["models_refreshed_at"] is not None
    models = {item["id"]: item for item in (await admin.get("/llm/models")).json()["data"]}
    assert models["mine/big"]["context_window"] == 32000
    assert models["mine/text-embed-1"]["capabilities"]["embeddings"] is True
    assert (models["scripted/echo"]["price"]["input_usd"], models["mine/big"]["price"]) == (0, None)
    upstream.otherwise = up.refuses(500)
    answer = await admin.post("/llm/providers/mine/refresh")
    assert (answer.status, answer.code) == (502, "provider_error")
    view = (await admin.get("/llm/providers/mine")).json()
    assert (view["listed_models"], view["last_error"]["code"]) == (["big", "text-embed-1"], "provider_error")
    await admin.delete("/llm/providers/mine")
    await admin.post("/llm/providers", new)
    assert (await admin.get("/llm/providers/mine")).json()["listed_models"] == []


@pytest.mark.parametrize("path", ["/llm/models/up/m1", "/llm/models/up%2Fm1", "/llm/models/up/m1/"])
async def test_a_model_is_read_by_its_full_name(kit: Any, path: str) -> None:
    answer = await (await kit.as_user("viewer")).get(path)
    assert answer.status == 200, answer
    assert (answer.json()["id"], answer.json()["context_window"]) == ("up/m1", 1000)
    assert (await (await kit.as_user("viewer")).get("/llm/models/up/none")).status == 404


async def test_an_invalid_list_of_models_affects_no_other_provider(
    kit: Any, upstream: Any, new: dict[str, Any]
) -> None:
    async def odd(exchange: up.Exchange) -> None:
        data = [{"id": "x", "context_length": True}, {"id": "y", "max_model_len": 0.5}]
        await exchange.json({"object": "list", "data": data})

    admin = await kit.as_user("admin")
    await admin.post("/llm/providers", new)
    upstream.behaviours = [odd]
    assert (await admin.post("/llm/providers/mine/refresh")).json()["listed_models"] == ["x", "y"]
    assert (await admin.get("/llm/models/mine/x")).json()["context_window"] is None
    stored = [{"id": "x", "context_window": True}]
    spoil = LlmProviderState.update(listed_models=stored, revision="spoiled").where(LlmProviderState.name == "mine")
    await kit.kernel.database.work(spoil.execute)
    assert (await admin.get("/llm/models")).status == 200
    assert (await admin.get("/llm/providers/mine")).json()["listed_models"] == []
    assert (await ask(admin, "scripted/echo")).status == 200


async def test_an_error_of_refresh_shows_no_key(kit: Any, upstream: Any) -> None:
    async def repeats(exchange: up.Exchange) -> None:
        message = f"Incorrect key: {exchange.request.headers['authorization']}"
        await exchange.json({"error": {"message": message}}, 401)

    admin = await kit.as_user("admin")
    upstream.otherwise = repeats
    answer = await admin.post("/llm/providers/up/refresh")
    assert (answer.status, answer.json()["detail"]) == (502, "up: Incorrect key: Bearer [redacted]")
    assert up.KEY not in (await admin.get("/llm/providers/up")).body.decode()
    state = await kit.kernel.database.work(lambda: LlmProviderState.get_by_id("up"), read=True)
    assert up.KEY not in repr(state.last_error)


async def test_refresh_times_out(kit: Any, upstream: Any, new: dict[str, Any]) -> None:
    admin = await kit.as_user("admin")
    await admin.post("/llm/providers", {**new, "timeouts": {"total_seconds": 1}})
    upstream.otherwise = up.hangs
    answer = await asyncio.wait_for(admin.post("/llm/providers/mine/refresh"), 10)
    assert (answer.status, answer.code) == (504, "upstream_timeout")


async def test_prices_are_those_of_tokens_in_ordinary_calls(
    make_kit: Callable[..., Any], providers: dict[str, Any]
) -> None:
    named = {"anthropic": {"api_key": up.KEY, "models": [{"id": "claude-sonnet-4-5"}]}}
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": {**providers, **named}}})
    admin = await kit.as_user("admin")
    price = (await admin.get("/llm/models/anthropic/claude-sonnet-4-5")).json()["price"]
    listed = (await admin.get("/cost/prices/lookup?provider=anthropic&model=claude-sonnet-4-5")).json()
    assert price == {name: listed[name] for name in price}
    own = {"provider": "up", "model": "m1", "input_usd": 0.0375, "output_usd": 2, "per_call_usd": 0.5}
    assert (await admin.post("/cost/prices", own)).status == 201
    price = (await admin.get("/llm/models/up/m1")).json()["price"]
    assert (price["input_usd"], price["output_usd"], price["cache_read_usd"]) == (0.0375, 2, 0.0375)


async def test_a_test_makes_a_short_call(kit: Any, upstream: Any) -> None:
    admin = await kit.as_user("admin")
    answer = await admin.post("/llm/providers/up/test", {})
    assert (answer.json()["ok"], answer.json()["model"]) == (True, "up/m1")
    assert answer.json()["first_token_ms"] is not None
    assert len((await admin.get("/cost/events")).json()["items"]) == 1
    upstream.otherwise = up.refuses(401)
    answer = await admin.post("/llm/providers/up/test", {"model": "m2"})
    assert (answer.status, answer.json()["ok"], answer.json()["error"]["code"]) == (200, False, "provider_error")
    assert (await admin.get("/llm/providers/up")).json()["last_error"]["code"] == "provider_error"
    assert (await admin.post("/llm/providers/groq/test", {})).status == 400


async def test_a_provider_used_by_agents_cannot_be_deleted(kit: Any, new: dict[str, Any]) -> None:
    admin = await kit.as_user("admin")
    await admin.post("/llm/providers", new)
    agent = await admin.post("/agents", {"name": "a", "role": "coder", "llm_provider": "mine"})
    assert agent.status == 201, agent
    answer = await admin.delete("/llm/providers/mine")
    assert (answer.status, answer.code) == (409, "in_use")
    assert answer.json()["references"] == [{"type": "agent", "id": agent.json()["id"]}]
    named = await admin.post("/agents", {"name": "b", "role": "coder", "llm_provider": "groq"})
    assert "provider_not_configured" in named.json()["warnings"]
    in_model = await admin.post("/agents", {"name": "c", "role": "coder", "llm_model": "groq/some-model"})
    assert "provider_not_configured" in in_model.json()["warnings"]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"kind": "nobody"}, "llm.providers.bad.kind"),
        ({"kind": "openai", "max_retries": 9}, "max_retries"),
        ({"kind": "openai", "surprise": 1}, "surprise"),
    ],
)
async def test_an_invalid_table_is_named(make_kit: Callable[..., Any], table: dict[str, Any], fault: str) -> None:
    kit = await make_kit(plugins=["cost", "llm"], config={"plugins.llm": {"providers": {"bad": table}}})
    assert kit.loaded("llm").state == "failed"
    assert fault in kit.loaded("llm").reason


async def test_an_invalid_url_is_refused(kit: Any) -> None:
    admin = await kit.as_user("admin")
    for url in ("https://\u00db[\u008c|\u0006", "http://[", "https://host:port/"):
        answer = await admin.post("/llm/providers", {"name": "mine", "kind": "openai", "base_url": url})
        assert (answer.status, answer.code) == (422, "url_blocked"), url
