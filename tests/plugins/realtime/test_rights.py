"""What keys, machines and auditors read of the log: what a read by id would show them, and their own account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.realtime.conftest import ear, settle

from corral.testing.kit import Client, Kit
from corral.testing.server import serving

ACCOUNT = {"user.created", "session.created", "api_key.created"}


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Kit:
    made: Kit = await make_kit(plugins=["realtime", "admin", "security", "agents", "secrets", "audit"])
    return made


async def key(kit: Kit, owner: Client, *scopes: str) -> Client:
    """A key of somebody."""
    answer = await owner.post("/security/api-keys", {"name": "narrow", "scopes": list(scopes)})
    assert answer.status == 201, answer
    return Client(kit.application.app, answer.json()["key"])


async def seen(kit: Kit, client: Client) -> list[dict[str, Any]]:
    """All that somebody gets of the log."""
    await settle(kit)
    answer = await client.get("/events?limit=200")
    assert answer.status == 200, answer
    found: list[dict[str, Any]] = answer.json()["items"]
    return found


def names(events: list[dict[str, Any]]) -> set[str]:
    return {each["event"] for each in events}


async def fill(kit: Kit) -> tuple[Client, Client]:
    """An admin and a member, an agent of the member, a secret."""
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    assert (await member.post("/agents", {"name": "Ada"})).status == 201
    assert (await admin.post("/secrets", {"name": "PROD_DB", "value": "abcdefgh-12345678"})).status == 201
    return admin, member


async def test_a_key_reads_events_of_the_areas_in_its_scopes(kit: Kit) -> None:
    admin, member = await fill(kit)
    assert names(await seen(kit, admin)) >= {"agent.created", "secret.created", "user.created", "session.created"}
    assert names(await seen(kit, await key(kit, admin, "secrets.read"))) == {"secret.created"} | ACCOUNT
    assert names(await seen(kit, await key(kit, member, "agents.read"))) == {"agent.created"} | ACCOUNT
    nothing = await seen(kit, await key(kit, admin, "realtime.read"))
    assert names(nothing) == ACCOUNT
    people = {each["data"].get("user_id", admin.user["id"]) for each in nothing}
    assert people == {admin.user["id"]}  # the account is its own, not everybody's
    accounts = await seen(kit, await key(kit, admin, "admin.read"))
    assert member.user["id"] in {each["data"].get("user_id") for each in accounts if each["event"] == "user.created"}
    assert "secret.created" not in names(accounts)
    assert names(await seen(kit, await key(kit, admin, "*"))) == names(await seen(kit, admin))


@pytest.mark.one_engine
async def test_a_socket_of_a_narrow_key_hears_no_more(kit: Kit) -> None:
    _, member = await fill(kit)
    narrow, wide = await key(kit, member, "realtime.read"), await key(kit, member, "realtime.read", "agents.read")
    await settle(kit)
    async with serving(kit) as port, ear(port, narrow) as one, ear(port, wide) as other:
        for each in (one, other):
            assert (await each.ask("subscribe", event="*"))["type"] == "subscribed"
        assert (await member.post("/agents", {"name": "Bea"})).status == 201
        await key(kit, member, "agents.read")
        assert (await other.hear())["event"] == "agent.created"
        assert (await one.hear())["event"] == "api_key.created"


async def test_a_machine_reads_no_account_and_an_auditor_only_their_own(kit: Kit) -> None:
    _, member = await fill(kit)
    agent = (await member.get("/agents")).json()["items"][0]["id"]
    token = (await member.post(f"/agents/{agent}/tokens", {"name": "t", "scopes": ["*"]})).json()["token"]
    assert names(await seen(kit, Client(kit.application.app, token))) == {"agent.created"}
    auditor = await kit.as_user("auditor")
    own = await seen(kit, auditor)
    assert names(own) == {"user.created", "session.created"}
    assert {each["object"]["id"] for each in own if each["event"] == "user.created"} == {auditor.user["id"]}
