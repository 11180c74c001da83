"""API keys of providers in the vault: stored, referenced, used for each call, and never shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up

from corral import clock
from corral.testing.kit import PASSWORD, Client

pytestmark = pytest.mark.one_engine

SECRET = "sk-vault-0a1b2c3d4e5f6a7b"


@pytest.fixture
async def kit(make_kit: Callable[..., Any], upstream: Any) -> Any:
    host = upstream.url.removeprefix("http://").removesuffix("/v1")
    return await make_kit(plugins=["cost", "agents", "llm", "secrets"], config={"egress.allow": [host]})


@pytest.fixture
def new(upstream: Any) -> dict[str, Any]:
    return {"name": "mine", "kind": "openai", "base_url": upstream.url, "max_retries": 0, "models": [{"id": "m1"}]}


async def ask(client: Any, *, stream: bool = False) -> Any:
    body = {"model": "mine/m1", "messages": [{"role": "user", "content": "x"}], "stream": stream}
    return await client.post("/llm/chat/completions", body)


async def test_a_key_in_a_body_is_stored_in_the_vault_and_used(kit: Any, upstream: Any, new: dict[str, Any]) -> None:
    admin, alice = await kit.as_user("admin"), await kit.as_user("member")
    made = await admin.post("/llm/providers", {**new, "api_key": SECRET})
    assert made.status == 201, made
    assert (made.json()["has_key"], made.json()["api_key_secret"]) == (True, "llm.mine.api_key")
    assert SECRET.encode() not in made.body
    secret = (await admin.get("/secrets")).json()["items"][0]
    assert (secret["name"], secret["category"]) == ("llm.mine.api_key", "api_key")
    assert secret["references"] == [{"kind": "provider", "id": "mine", "name": "mine"}]
    for stream in (False, True):
        assert (await ask(alice, stream=stream)).status == 200
        assert upstream.requests[-1].headers["authorization"] == f"Bearer {SECRET}"
    changed = await admin.put("/llm/providers/mine", {"api_key": "sk-vault-the-second-one-9"})
    assert (changed.status, changed.json()["version"]) == (200, 2)
    assert (await ask(alice)).status == 200
    assert upstream.requests[-1].headers["authorization"] == "Bearer sk-vault-the-second-one-9"
    assert (await admin.delete(f"/secrets/{secret['id']}")).code == "in_use"
    cleared = await admin.put("/llm/providers/mine", {"api_key": None})
    assert (cleared.json()["has_key"], cleared.json()["configured"]) == (False, True)
    assert (await ask(alice)).status == 200
    assert "authorization" not in upstream.requests[-1].headers
    assert (await admin.delete(f"/secrets/{secret['id']}")).status == 204


async def test_attaching_a_secret_requires_permission(make_kit: Callable[..., Any], new: dict[str, Any]) -> None:
    """A provider's key is sent to its base_url: whoever could attach any secret could read it there."""
    host = new["base_url"].removeprefix("http://").removesuffix("/v1")
    kit = await make_kit(plugins=["cost", "agents", "llm", "secrets", "security"], config={"egress.allow": [host]})
    admin = await kit.as_user("admin")
    await admin.post("/secrets", {"name": "shared", "value": SECRET})
    key = (await admin.post("/security/api-keys", {"name": "providers", "scopes": ["llm.*"]})).json()["key"]
    narrow = Client(admin.app, token=key)
    for name in ("shared", "absent"):
        refused = await narrow.post("/llm/providers", {**new, "api_key_secret": name})
        assert (refused.status, refused.code) == (403, "insufficient_scope"), refused
    own = await narrow.post("/llm/providers", {**new, "api_key": "sk-vault-of-its-own-77"})
    assert own.json()["api_key_secret"] == "llm.mine.api_key", own
    assert (await narrow.put("/llm/providers/mine", {"api_key_secret": "shared"})).status == 403
    assert (await admin.put("/llm/providers/mine", {"api_key_secret": "shared"})).status == 200
    again = await narrow.put("/llm/providers/mine", {"api_key_secret": "shared", "max_retries": 1})
    assert again.status == 200, "a form as it was read"


async def test_moving_a_stored_key_requires_the_rights_to_reveal_it(
    make_kit: Callable[..., Any], new: dict[str, Any]
) -> None:
    host = new["base_url"].removeprefix("http://").removesuffix("/v1")
    other = {"base_url": new["base_url"] + "/elsewhere"}
    plugins = ["cost", "agents", "llm", "secrets", "security"]
    kit = await make_kit(plugins=plugins, config={"egress.allow": [host]})
    admin = await kit.as_user("admin")

    async def keyed(*scopes: str) -> Client:
        made = await admin.post("/security/api-keys", {"name": "providers", "scopes": list(scopes)})
        return Client(admin.app, token=made.json()["key"])

    assert (await admin.post("/llm/providers", {**new, "api_key": SECRET})).status == 201
    narrow, writer = await keyed("llm.*"), await keyed("llm.*", "secrets.*")
    for client, code in ((narrow, "insufficient_scope"), (writer, "insufficient_scope"), (admin, "reauth_required")):
        for body in (other, {**other, "api_key_secret": "LLM.mine.api_key"}, {"base_url": None}):
            refused = await client.put("/llm/providers/mine", body)
            assert (refused.status, refused.code) == (403, code), (refused, body)
        assert (await client.put("/llm/providers/mine", {"base_url": new["base_url"], "max_retries": 1})).status == 200
    assert (await admin.get("/llm/providers/mine")).json()["base_url"] == new["base_url"]
    for body in ({**other, "api_key": "sk-vault-known-to-them-1"}, {"base_url": new["base_url"], "api_key": None}):
        assert (await narrow.put("/llm/providers/mine", body)).status == 200
    assert (await narrow.put("/llm/providers/mine", other)).status == 200, "there is no key any more"
    assert (await admin.put("/llm/providers/mine", {"api_key": SECRET})).status == 200
    assert (await admin.post("/auth/reauth", {"password": PASSWORD})).status == 200
    assert (await admin.put("/llm/providers/mine", {"base_url": new["base_url"]})).status == 200
    assert (await (await keyed("llm.*", "secrets.reveal")).put("/llm/providers/mine", other)).status == 200


async def test_a_provider_names_a_secret(kit: Any, upstream: Any, new: dict[str, Any]) -> None:
    admin, alice = await kit.as_user("admin"), await kit.as_user("member")
    missing = await admin.post("/llm/providers", {**new, "api_key_secret": "shared"})
    assert (missing.status, missing.code) == (400, "unknown_reference")
    assert missing.json()["errors"][0]["pointer"] == "/api_key_secret"
    made = await admin.post("/secrets", {"name": "shared", "value": SECRET, "allowed_hosts": ["127.0.0.1"]})
    assert (await admin.post("/llm/providers", {**new, "api_key_secret": "shared"})).status == 201
    assert (await ask(alice)).status == 200
    assert upstream.requests[-1].headers["authorization"] == f"Bearer {SECRET}"
    await admin.post(f"/secrets/{made.json()['id']}/rotate", {"value": "sk-vault-rotated-0123"})
    assert (await ask(alice)).status == 200
    assert upstream.requests[-1].headers["authorization"] == "Bearer sk-vault-rotated-0123"
    asked = len(upstream.requests)
    await admin.put(f"/secrets/{made.json()['id']}", {"allowed_hosts": ["api.example.org"]})
    refused = await ask(alice)
    assert (refused.status, refused.code) == (503, "dependency_unavailable")
    await admin.put(f"/secrets/{made.json()['id']}", {"allowed_hosts": [], "expires_at": clock.now(30)})
    clock.travel(31)
    admin, alice = [await kit.sign_in(who.user["email"]) for who in (admin, alice)]
    assert (await ask(alice)).code == "secret_expired"
    assert len(upstream.requests) == asked


async def test_a_preset_is_configured_by_a_key(kit: Any) -> None:
    admin = await kit.as_user("admin")
    assert (await admin.get("/llm/providers/groq")).json()["configured"] is False
    changed = await admin.put("/llm/providers/groq", {"api_key": SECRET})
    assert (changed.status, changed.json()["configured"]) == (200, True)


async def test_masks_and_two_keys_are_refused(kit: Any, new: dict[str, Any]) -> None:
    admin = await kit.as_user("admin")
    masked = await admin.post("/llm/providers", {**new, "api_key": "********"})
    assert (masked.status, masked.code) == (400, "masked_value_submitted")
    both = await admin.post("/llm/providers", {**new, "api_key": SECRET, "api_key_secret": "x"})
    assert (both.status, both.json()["errors"][0]["pointer"]) == (400, "/api_key")
    assert (await admin.get("/secrets")).json()["total"] == 0


async def test_a_key_repeated_by_the_provider_is_redacted(kit: Any, upstream: Any, new: dict[str, Any]) -> None:
    admin, alice = await kit.as_user("admin"), await kit.as_user("member")
    await admin.post("/llm/providers", {**new, "api_key": SECRET})
    redactor = kit.kernel.redactor
    while SECRET in redactor.redact(SECRET, patterns=False):  # noqa: ASYNC110  (what is waited for has no bell)
        await asyncio.sleep(0.02)
    upstream.otherwise = up.says(f"your key is {SECRET}")
    for stream in (False, True):
        assert SECRET.encode() not in (await ask(alice, stream=stream)).body
    upstream.otherwise = up.refuses(401, f"bad key {SECRET}")
    refused = await ask(alice)
    assert (refused.code, SECRET.encode() in refused.body) == ("provider_error", False)
    told = [json.loads(event.data) for event in await kit.events() if event.type == "system.alert"]
    found = [alert for alert in told if alert["kind"] == "secret_detected"]
    assert [(alert["object"], "llm.mine.api_key" in alert["title"]) for alert in found] == [
        ({"type": "llm_provider", "id": "mine"}, True)
    ]
