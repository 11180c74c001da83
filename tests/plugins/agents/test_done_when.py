"""What the page of agents promises, number by number, with the real tasks and workers.

Waiting for a part that comes later: of 2, "no tool or model call is recorded" (tools, and the record of model calls);
of 7, loosening a dangerous tool (tools).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral.testing.kit import Client, Kit


@pytest.fixture
async def kit(make_kit: Callable[..., Awaitable[Kit]], request: pytest.FixtureRequest) -> Kit:
    """Tasks and workers only where a machine works."""
    made = await make_kit(plugins=["agents", "tasks", "workers"] if "machine" in request.fixturenames else ["agents"])
    assert {item.name: item.reason for item in made.kernel.plugins if not item.active} == {}
    return made


class Machine:
    """A worker that is approved and speaks the protocol."""

    def __init__(self, kit: Kit, registered: dict[str, Any]) -> None:
        self.id, self.client = registered["id"], Client(kit.application.app, registered["token"])

    async def claim(self) -> dict[str, Any] | None:
        answer = await self.client.post(f"/workers/{self.id}/claim", {"max_tasks": 1})
        assert answer.status == 200, answer
        return next(iter(answer.json()["tasks"]), None)

    async def call(self, claim: dict[str, Any], name: str, **body: Any) -> Any:
        path = f"/tasks/{claim['task']['id']}/{name}"
        return await self.client.post(path, {"lease_id": claim["lease_id"], **body})


@pytest.fixture
async def machine(kit: Kit, alice: Client, admin: Client) -> Machine:
    answer = await alice.post("/workers/register", {"name": "one", "max_agents": 5})
    assert answer.status == 201, answer
    approved = await admin.patch(f"/admin/workers/{answer.json()['id']}/approve", {"is_approved": True})
    assert approved.status == 200, approved
    return Machine(kit, answer.json())


async def started(client: Client, name: str = "Ada", **fields: Any) -> str:
    agent = (await client.post("/agents", {"name": name, **fields})).json()["id"]
    answer = await client.post(f"/agents/{agent}/start")
    assert (answer.status, answer.json()["status"]) == (200, "idle")
    return str(agent)


async def task_for(client: Client, agent: str) -> str:
    answer = await client.post("/tasks", {"title": "Work", "agent_id": agent})
    assert answer.status == 201, answer
    return str(answer.json()["id"])


async def working(machine: Machine, client: Client, agent: str) -> dict[str, Any]:
    """A claim of a new task that runs."""
    task = await task_for(client, agent)
    claim = await machine.claim()
    assert claim is not None
    assert claim["task"]["id"] == task
    assert (await machine.call(claim, "start")).status == 200
    return claim


async def status(client: Client, path: str) -> str:
    return str((await client.get(path)).json()["status"])


async def test_agents_1_from_created_to_busy_and_back(kit: Kit, alice: Client, machine: Machine, payloads: Any) -> None:
    agent = await started(alice)
    claim = await working(machine, alice, agent)
    view = (await alice.get(f"/agents/{agent}")).json()
    assert (view["status"], view["current_task_ids"]) == ("busy", [claim["task"]["id"]])
    assert (await machine.call(claim, "complete", result={"text": "done"})).status == 200
    assert await status(alice, f"/agents/{agent}") == "idle"
    changes = await payloads(kit, "agent.status")
    assert [(item["from"], item["to"]) for item in changes] == [("offline", "idle"), ("idle", "busy"), ("busy", "idle")]


async def test_agents_2_stop_means_stop(alice: Client, machine: Machine) -> None:
    agent = await started(alice)
    claim = await working(machine, alice, agent)
    path = f"/tasks/{claim['task']['id']}"
    answer = await alice.post(f"/agents/{agent}/stop")
    assert (answer.status, answer.json()["status"], answer.json()["active_tasks"]) == (200, "offline", 0)
    task = (await alice.get(path)).json()
    assert (task["status"], task["attempt"]) == ("pending", 0)
    late = await machine.call(claim, "complete", result={"text": "late"})
    assert (late.status, late.code) == (409, "lease_lost")
    assert await machine.claim() is None
    await alice.post(f"/agents/{agent}/start")
    again = await machine.claim()
    assert again is not None
    assert again["task"]["id"] == claim["task"]["id"]


async def test_agents_2_stop_can_cancel_the_work_in_hand(alice: Client, machine: Machine) -> None:
    agent = await started(alice)
    claim = await working(machine, alice, agent)
    await alice.post(f"/agents/{agent}/stop", {"cancel_tasks": True})
    assert await status(alice, f"/tasks/{claim['task']['id']}") == "cancelled"


async def test_agents_2_stops_at_once_are_one_change(kit: Kit, alice: Client, machine: Machine, payloads: Any) -> None:
    agent = await started(alice, max_concurrent_tasks=2)
    await task_for(alice, agent)
    for _ in range(10):
        assert await machine.claim() is not None
        answers = await asyncio.gather(*[alice.post(f"/agents/{agent}/stop") for _ in range(4)])
        assert {(answer.status, answer.json()["status"]) for answer in answers} == {(200, "offline")}
        await alice.post(f"/agents/{agent}/start")
    changes = [(item["from"], item["to"]) for item in await payloads(kit, "agent.status")]
    assert changes == [("offline", "idle"), *[("idle", "busy"), ("busy", "offline"), ("offline", "idle")] * 10]


async def test_agents_3_drain_ends_with_the_last_lease(alice: Client, machine: Machine) -> None:
    agent = await started(alice, max_concurrent_tasks=2)
    claim = await working(machine, alice, agent)
    answer = await alice.post(f"/agents/{agent}/stop", {"mode": "drain"})
    assert answer.json()["status"] == "draining"
    await task_for(alice, agent)
    assert await machine.claim() is None
    assert (await machine.call(claim, "complete", result={})).status == 200
    assert await status(alice, f"/agents/{agent}") == "offline"


async def test_agents_4_each_attempt_has_its_version(alice: Client, machine: Machine) -> None:
    agent = await started(alice, system_prompt="one")
    claim = await working(machine, alice, agent)
    assert (claim["agent"]["version"], claim["agent"]["system_prompt"]) == (1, "one")
    await alice.patch(f"/agents/{agent}", {"system_prompt": "two"})
    attempts = (await alice.get(f"/tasks/{claim['task']['id']}/attempts")).json()["items"]
    assert [item["agent_version"] for item in attempts] == [1]
    assert (await machine.call(claim, "complete", result={})).status == 200
    claim = await working(machine, alice, agent)
    assert (claim["agent"]["version"], claim["agent"]["system_prompt"]) == (2, "two")
    back = (await alice.post(f"/agents/{agent}/rollback", {"version": 1})).json()
    assert (back["config_version"], back["system_prompt"]) == (3, "one")


async def test_agents_5_one_name_twice_at_once(kit: Kit, alice: Client) -> None:
    answers = await asyncio.gather(*(alice.post("/agents", {"name": name}) for name in ("Ada", "ada")))
    assert sorted(answer.status for answer in answers) == [201, 409]
    made, refused = sorted(answers, key=lambda answer: answer.status)
    assert (refused.code, refused.json()["existing_id"]) == ("duplicate", made.json()["id"])


async def test_agents_6_an_agent_that_works_is_not_deleted_by_mistake(alice: Client, machine: Machine) -> None:
    agent = await started(alice)
    claim = await working(machine, alice, agent)
    waiting = await task_for(alice, agent)
    task = claim["task"]["id"]
    answer = await alice.delete(f"/agents/{agent}")
    assert (answer.status, answer.code, answer.json()["task_ids"]) == (409, "agent_busy", [task])
    answer = await alice.delete(f"/agents/{agent}?force=true")
    assert (answer.status, answer.headers["corral-affected"]) == (204, "tasks=2")
    assert await status(alice, f"/tasks/{task}") == "cancelled"
    assert (await alice.get(f"/tasks/{waiting}")).json()["agent_id"] is None
    assert (await alice.get(f"/agents/{agent}")).status == 404


async def test_agents_7_members_loosen_nothing_and_leave_others_alone(kit: Kit, alice: Client, admin: Client) -> None:
    agent = await started(alice)
    path, loose = f"/agents/{agent}", {"http.fetch": {"when_tainted": "allow"}}
    assert (await alice.patch(path, {"tool_policy": loose})).code == "forbidden"
    assert (await alice.post("/agents", {"name": "Loose", "tool_policy": loose})).code == "forbidden"
    assert (await admin.patch(path, {"tool_policy": loose})).status == 200
    assert (await alice.patch(path, {"tool_policy": {**loose, "ssh.execute": "deny"}})).status == 200
    assert (await alice.post(f"{path}/clone", {"name": "Copy"})).code == "forbidden"
    assert (await alice.patch(path, {"tool_policy": {}})).status == 200
    assert (await alice.post(f"{path}/rollback", {"version": 2})).code == "forbidden"
    bob, viewer = await kit.as_user("member"), await kit.as_user("viewer")
    assert (await bob.patch(path, {"description": "mine"})).code == "forbidden"
    assert (await viewer.get(path)).status == 200


async def test_agents_8_an_attempt_token_dies_with_its_lease(kit: Kit, alice: Client, machine: Machine) -> None:
    agent = await started(alice)
    claim = await working(machine, alice, agent)
    ada = Client(kit.application.app, claim["agent_token"])
    assert (await ada.get(f"/agents/{agent}")).status == 200
    assert (await machine.call(claim, "complete", result={})).status == 200
    assert (await ada.get(f"/agents/{agent}")).status == 401
