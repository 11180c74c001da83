"""Standing tokens: who makes them, what they may do, and what ends them."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral import clock
from corral.errors import Unauthorized
from corral.testing.kit import Client, Kit
from corral_core.accounts.api import Accounts, Tickets, UserPatch
from corral_plugins.agents import jobs
from corral_plugins.agents.models import AgentToken


async def made(client: Client, **fields: Any) -> tuple[str, dict[str, Any]]:
    agent = (await client.post("/agents", {"name": "Ada"})).json()["id"]
    answer = await client.post(f"/agents/{agent}/tokens", {"name": "laptop", **fields})
    assert answer.status == 201, answer
    return agent, answer.json()


def acting(kit: Kit, token: str) -> Client:
    return Client(kit.application.app, token)


async def change(kit: Kit, client: Client, **fields: Any) -> None:
    accounts = kit.kernel.container.get(Accounts)
    await kit.kernel.database.work(lambda: accounts.update(client.user["id"], UserPatch(**fields)))
    kit.kernel.credentials.forget(lambda caller: True)


async def test_a_token_is_shown_once_and_acts_as_the_agent(kit: Kit, alice: Client) -> None:
    agent, token = await made(alice)
    assert token["token"].startswith("cra_s")
    assert token["scopes"] == ["*"]
    days = clock.elapsed_ms(token["created_at"], token["expires_at"]) / 86_400_000
    assert round(days) == 90
    answer = await alice.get(f"/agents/{agent}/tokens")
    assert answer.headers["cache-control"] == "no-store"
    (listed,) = answer.json()["items"]
    assert listed == {key: value for key, value in token.items() if key != "token"}
    stored = await kit.kernel.database.work(lambda: AgentToken.get().token_hash, read=True)
    assert stored == hashlib.sha256(token["token"].encode()).hexdigest()
    ada = acting(kit, token["token"])
    assert (await ada.get(f"/agents/{agent}")).status == 200
    for answer in (
        await ada.post("/agents", {"name": "Bea"}),
        await ada.patch(f"/agents/{agent}", {"description": "x"}),
        await ada.post(f"/agents/{agent}/start"),
        await ada.get(f"/agents/{agent}/tokens"),
        await ada.post(f"/agents/{agent}/tokens", {"name": "t"}),
    ):
        assert answer.status == 403
    assert (await acting(kit, "cra_sforged").get("/agents")).status == 401


async def test_a_ticket_ends_with_the_token_that_asked_for_it(kit: Kit, alice: Client) -> None:
    agent, token = await made(alice)
    other = (await alice.post(f"/agents/{agent}/tokens", {"name": "desk"})).json()
    tickets, work = kit.kernel.container.get(Tickets), kit.kernel.database.work

    async def issue(credential: str) -> str:
        return str((await acting(kit, credential).post("/auth/ws-ticket")).json()["ticket"])

    opened, late, elsewhere = await issue(token["token"]), await issue(token["token"]), await issue(other["token"])
    caller = await work(lambda: tickets.redeem(opened))
    assert (caller.kind, caller.id, caller.user_id) == ("agent", agent, alice.user["id"])
    await alice.delete(f"/agents/{agent}/tokens/{token['id']}")
    for dead in (lambda: tickets.reread(caller), lambda: tickets.redeem(late)):
        with pytest.raises(Unauthorized):
            await work(dead)
    still = await work(lambda: tickets.redeem(elsewhere))
    await change(kit, alice, is_active=False)
    with pytest.raises(Unauthorized):
        await work(lambda: tickets.reread(still))


@pytest.mark.one_engine
async def test_what_ends_a_token(kit: Kit, alice: Client) -> None:
    agent, token = await made(alice)
    ada = acting(kit, token["token"])
    await change(kit, alice, is_active=False)
    assert (await ada.get("/agents")).status == 401
    await change(kit, alice, is_active=True)
    assert (await ada.get("/agents")).status == 200
    await change(kit, alice, role="auditor")
    assert (await ada.get("/agents")).status == 403
    await change(kit, alice, role="member")
    admin = await kit.as_user("admin")
    path = f"/agents/{agent}/tokens"
    assert (await admin.delete(f"{path}/{token['id']}")).status == 204
    assert (await admin.delete(f"{path}/{token['id']}")).status == 404
    assert (await ada.get("/agents")).status == 401
    second = (await admin.post(path, {"name": "t"})).json()
    ada = acting(kit, second["token"])
    assert (await ada.get("/agents")).status == 200
    await admin.delete(f"/agents/{agent}")
    assert (await ada.get("/agents")).status == 401


@pytest.mark.one_engine
async def test_expiry_and_scopes(kit: Kit, alice: Client) -> None:
    agent, _ = await made(alice)
    path = f"/agents/{agent}/tokens"
    now = datetime.datetime.now(datetime.UTC)
    soon = (now + datetime.timedelta(hours=1)).isoformat()
    for body, code in (
        ({"name": "t", "expires_at": (now - datetime.timedelta(1)).isoformat()}, "in_the_past"),
        ({"name": "t", "expires_at": (now + datetime.timedelta(366)).isoformat()}, "too_large"),
        ({"name": "t", "scopes": ["agents.manage"]}, "not_in_enum"),
        ({"name": "t", "scopes": []}, "too_short"),
    ):
        answer = await alice.post(path, body)
        assert (answer.status, answer.json()["errors"][0]["code"]) == (422, code)
    token = (await alice.post(path, {"name": "t", "scopes": ["*.read"], "expires_at": soon})).json()
    ada = acting(kit, token["token"])
    assert (await ada.get("/agents")).status == 200
    clock.travel(3601)
    answer = await ada.get("/agents")
    assert (answer.status, answer.code) == (401, "token_expired")
    await kit.kernel.database.work(jobs.delete_expired_tokens)
    assert await kit.kernel.database.work(lambda: AgentToken.select().count(), read=True) == 1


@pytest.mark.one_engine
async def test_an_api_key_neither_makes_nor_ends_a_token(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=["agents", "security"])
    alice = await kit.as_user("member")
    agent, token = await made(alice)
    issued = await alice.post("/security/api-keys", {"name": "narrow", "scopes": ["agents.write"]})
    key = acting(kit, issued.json()["key"])
    path = f"/agents/{agent}/tokens"
    assert (await key.get(path)).status == 200
    for answer in (
        await key.post(path, {"name": "t", "scopes": ["*"]}),
        await key.post(path, {"name": "t", "scopes": ["agents.write"]}),
        await key.delete(f"{path}/{token['id']}"),
    ):
        assert (answer.status, answer.code) == (403, "insufficient_scope")
    assert (await acting(kit, token["token"]).get("/agents")).status == 200


@pytest.mark.one_engine
async def test_making_and_ending_a_token_is_written_down(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=["agents", "audit"])
    alice, auditor = await kit.as_user("member"), await kit.as_user("auditor")
    agent, token = await made(alice, scopes=["*.read"])
    assert (await alice.delete(f"/agents/{agent}/tokens/{token['id']}")).status == 204
    answer = await auditor.get("/admin/audit?action=agents.token.*")
    rows = answer.json()["items"][::-1]
    assert [row["action"] for row in rows] == ["agents.token.create", "agents.token.end"]
    for row in rows:
        assert row["object"] == {"type": "agent_token", "id": token["id"], "name": "laptop"}
        assert (row["actor"]["id"], row["details"]["agent_id"]) == (alice.user["id"], agent)
    assert rows[0]["details"]["scopes"] == ["*.read"]
    assert token["token"] not in answer.body.decode()


@pytest.mark.one_engine
@pytest.mark.parametrize("code", ["password_change_required", "mfa_required"])
async def test_a_token_is_no_way_round_what_its_maker_must_do(
    make_kit: Callable[..., Awaitable[Kit]], code: str
) -> None:
    required = {"settings.security.require_mfa": True, "settings.security.require_mfa_roles": ["admin"]}
    kit = await make_kit(plugins=["agents"], config=required)
    alice = await kit.as_user("member")
    _, token = await made(alice)
    ada = acting(kit, token["token"])
    assert (await ada.get("/agents")).status == 200
    await change(kit, alice, **({"role": "admin"} if code == "mfa_required" else {"must_change_password": True}))
    answer = await ada.get("/agents")
    assert (answer.status, answer.code) == (403, code)


@pytest.mark.one_engine
async def test_ten_tokens_at_most(alice: Client) -> None:
    agent, _ = await made(alice)
    statuses = [(await alice.post(f"/agents/{agent}/tokens", {"name": "t"})).status for _ in range(10)]
    assert statuses == [201] * 9 + [429]


async def test_tokens_of_a_purged_person_are_deleted(kit: Kit, alice: Client) -> None:
    await made(alice)
    accounts = kit.kernel.container.get(Accounts)
    await change(kit, alice, is_active=False)
    await kit.kernel.database.work(lambda: accounts.purge(alice.user["id"]))
    consumer = next(item for item in kit.kernel.consumers if item.name == "agents.people")
    purged = {"type": "user.purged", "object_id": alice.user["id"]}
    await kit.kernel.database.work(lambda: consumer._handle(_Record(**purged)))
    assert await kit.kernel.database.work(lambda: AgentToken.select().count(), read=True) == 0


class _Record:
    """As much of an event as the subscriber reads."""

    def __init__(self, type: str, object_id: str) -> None:
        self.type, self.object_id = type, object_id
