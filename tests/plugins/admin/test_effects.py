"""What a deactivation, a purge and the kill switch do to work; in every process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import within
from tests.plugins.tasks.conftest import World

from corral.testing.kit import PASSWORD, Client, Kit

PLUGINS = ("admin", "agents", "cost", "llm", "security", "tasks", "tools", "workers")


@pytest.fixture
async def world(make_kit: Callable[..., Any]) -> World:
    """People, a started agent, an approved worker; consumers and jobs run."""
    return await World().build(await make_kit(plugins=PLUGINS, jobs=True))


async def elsewhere(world: World, make_kit: Callable[..., Any]) -> Kit:
    """A second process of the same installation."""
    kit: Kit = await make_kit(plugins=PLUGINS)
    return kit


async def eventually(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    async with within(seconds):
        while not await holds():  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.1)


async def chat(client: Client) -> Any:
    body = {"model": "scripted/echo", "messages": [{"role": "user", "content": "hello"}]}
    return await client.post("/llm/chat/completions", body)


async def switch(world: World, engaged: bool, **more: Any) -> None:
    answer = await world.admin.post("/admin/kill-switch", {"engaged": engaged, "reason": "a drill", **more})
    assert answer.status == 200, answer


def of_attempt(kit: Kit, claim: dict[str, Any]) -> Client:
    return Client(kit.application.app, claim["agent_token"])


# -- the kill switch


async def test_admin_4_every_process_stops_claims_and_calls_and_goes_on_with_no_attempt_used(
    world: World, make_kit: Callable[..., Any]
) -> None:
    other = await elsewhere(world, make_kit)
    running, waiting = await world.task("runs"), await world.task("waits")
    idle = await world.agent("idle", start=False)
    lease = await world.worker.run()
    assert (await chat(world.member)).status == 200
    await switch(world, True)
    worker_there = Client(other.application.app, world.worker.client.token)
    for kit, worker in ((world.kit, world.worker.client), (other, worker_there)):
        claimed = await worker.post(f"/workers/{world.worker.id}/claim", {})
        assert claimed.json() == {"tasks": [], "reason": "kill_switch"}
        for caller in (Client(kit.application.app, world.member.token), of_attempt(kit, lease.claim)):
            refused = await chat(caller)
            assert (refused.status, refused.code) == (503, "kill_switch")
            assert int(refused.headers["retry-after"]) > 0
        call = {"call_id": "c1", "lease_id": lease.lease_id, "arguments": {"task_id": lease.task_id}}
        refused = await of_attempt(kit, lease.claim).post(f"/tasks/{lease.task_id}/tools/tasks.get", call)
        assert (refused.status, refused.code) == (503, "kill_switch"), refused
        started = await Client(kit.application.app, world.member.token).post(f"/agents/{idle}/start")
        assert (started.status, started.code) == (503, "kill_switch")
    assert (await world.member.get("/tasks")).status == 200  # people keep full use of the API
    assert (await world.heartbeat(lease))["leases"][0]["state"] == "ok"  # what runs keeps its lease
    await switch(world, False)
    assert (await chat(of_attempt(world.kit, lease.claim))).status == 200
    await lease.ok("complete", {"result": 1})
    [following] = await world.worker.claim_all(max_tasks=4)
    assert following.task_id == ({running, waiting} - {lease.task_id}).pop()
    assert [each["attempt"] for each in (lease.claim, following.claim)] == [1, 1]


async def test_the_switch_survives_a_restart_and_is_told(world: World, make_kit: Callable[..., Any]) -> None:
    await switch(world, True, mode="pause", hold_deliveries=True)
    again = await elsewhere(world, make_kit)
    admin = await again.sign_in(world.admin.user["email"])
    shown = (await admin.get("/admin/kill-switch")).json()
    assert (shown["engaged"], shown["hold_deliveries"], shown["reason"]) == (True, True, "a drill")
    assert shown["engaged_by"] == world.admin.user["id"]
    await switch(world, False)
    released = (await admin.get("/admin/kill-switch")).json()
    assert (released["engaged"], released["hold_deliveries"], released["engaged_by"]) == (False, False, None)
    alerts = [event.payload() for event in await world.kit.events() if event.type == "system.alert"]
    kinds = [(alert["kind"], alert["severity"]) for alert in alerts if alert["kind"] == "kill_switch"]
    assert kinds == [("kill_switch", "critical"), ("kill_switch", "info")]
    engaged = next(alert for alert in alerts if alert["kind"] == "kill_switch")
    assert (engaged["engaged"], engaged["mode"], engaged["reason"]) == (True, "pause", "a drill")


# -- deactivation


async def test_admin_5_nothing_of_a_deactivated_person_starts_or_calls(world: World) -> None:
    task_id = await world.task()
    running = await world.task()
    lease = await world.worker.run()
    queued = ({task_id, running} - {lease.task_id}).pop()
    agent = of_attempt(world.kit, lease.claim)
    assert (await chat(agent)).status == 200
    path = f"/admin/users/{world.member.user['id']}"
    assert (await world.admin.patch(path, {"is_active": False})).status == 200

    async def is_refused() -> bool:
        return bool((await chat(agent)).status == 401)

    await eventually(is_refused, 5)
    assert (await world.member.get("/tasks")).status == 401
    await asyncio.sleep(1.2)  # accounts are read again after a second
    assert await world.worker.claim_all(max_tasks=4) == []
    told = (await world.admin.get(f"/tasks/{queued}/explain")).json()
    assert "requester_active" in [each["code"] for each in told["conditions"] if not each["ok"]]
    assert (await world.admin.patch(path, {"is_active": True})).status == 200
    assert (await world.member.get("/tasks")).status == 401  # sessions do not come back
    await asyncio.sleep(1.2)
    await world.tick()
    [again] = await world.worker.claim_all(max_tasks=4)
    assert (again.task_id, again.claim["attempt"]) == (queued, 1)


# -- purge


async def purge(world: World, client: Client) -> None:
    from corral_core.accounts.api import Accounts

    user_id = client.user["id"]
    await world.admin.patch(f"/admin/users/{user_id}", {"is_active": False})
    accounts: Any = world.kit.kernel.container.get(Accounts)
    await world.kit.kernel.database.work(lambda: accounts.purge(user_id))


async def test_admin_5_after_a_purge_what_was_private_is_gone_and_what_was_shared_stays(world: World) -> None:
    bob = await world.kit.as_user("member", "bob@example.org")
    agent = (await bob.post("/agents", {"name": "bobs"})).json()
    token = await bob.post(f"/agents/{agent['id']}/tokens", {"name": "outside"})
    assert token.status == 201, token
    key = await bob.post("/security/api-keys", {"name": "script"})
    assert key.status == 201, key
    waits = await world.task(by=bob)
    runs = await world.task(by=bob)
    lease = await world.worker.run()
    assert lease.task_id in (waits, runs)
    invitation = await world.admin.post("/admin/invitations", {"email": "eve@example.org"})
    assert invitation.status == 201
    await purge(world, bob)

    async def ended() -> bool:
        states = {each: (await world.read(each))["status"] for each in (waits, runs)}
        return all(state in ("cancelled", "cancelling") for state in states.values())

    await eventually(ended)
    await lease.ok("cancelled")
    assert {(await world.read(each))["status"] for each in (waits, runs)} == {"cancelled"}

    async def token_is_gone() -> bool:
        outside = Client(world.kit.application.app, token.json()["token"])
        return bool((await outside.get(f"/agents/{agent['id']}")).status == 401)

    await eventually(token_is_gone)
    script = Client(world.kit.application.app, key.json()["key"])
    assert (await script.get("/tasks")).status == 401
    keys = (await world.admin.get("/security/api-keys?all=true")).json()["items"]
    assert [each for each in keys if each["owner"]["id"] == bob.user["id"]] == []

    # shared: members read it, admins write it, and it names a deleted user
    shown = await world.member.get(f"/agents/{agent['id']}")
    assert shown.status == 200, shown
    renamed = {"description": "still here"}
    assert (await world.member.patch(f"/agents/{agent['id']}", renamed)).status == 403
    assert (await world.admin.patch(f"/agents/{agent['id']}", renamed)).status == 200
    listed = (await world.admin.get("/admin/users?limit=200")).json()["items"]
    assert bob.user["id"] not in [user["id"] for user in listed]
    tombstone = (await world.admin.get(f"/admin/users/{bob.user['id']}")).json()
    assert (tombstone["email"], tombstone["full_name"]) == ("", "deleted user")

    # the address is free
    again = await world.kit.as_user("member", "bob@example.org")
    assert again.user["id"] != bob.user["id"]
    login = await world.kit.client.post("/auth/login", {"email": "bob@example.org", "password": PASSWORD})
    assert login.json()["user"]["id"] == again.user["id"]


async def test_a_purge_takes_more_tasks_than_fit_a_unit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from corral_plugins.tasks.service import leases

    monkeypatch.setattr(leases, "CANCEL_BATCH_SIZE", 2)
    bob = await world.kit.as_user("member")
    mine = [await world.task(by=bob) for _ in range(5)]
    others = await world.task()
    await purge(world, bob)

    async def ended() -> bool:
        return {(await world.read(each))["status"] for each in mine} == {"cancelled"}

    await eventually(ended)
    assert (await world.read(others))["status"] == "pending"
