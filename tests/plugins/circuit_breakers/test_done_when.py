"""The criteria of the page "Circuit breakers" that one process can show, with a provider that answers on a socket.

Criteria 2, 3 and 5 are in `test_processes.py`, criterion 7 in `test_administration.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up
from tests.plugins.llm.conftest import providers, upstream  # noqa: F401  (fixtures)
from tests.plugins.tasks.conftest import World

from corral import clock
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.circuit_breakers.service.breakers import BreakersService

PLUGINS = ("admin", "agents", "circuit_breakers", "cost", "llm", "tasks", "workers")
BREAKER = "/circuit-breakers/llm:up"


@pytest.fixture
async def kit(make_kit: Callable[..., Any], providers: dict[str, Any]) -> Kit:  # noqa: F811
    config = {"plugins.llm": {"providers": providers}, "settings.llm.default_model": "up/m1"}
    made: Kit = await make_kit(plugins=PLUGINS, config=config)
    return made


async def ask(client: Client, model: str = "up/m1", **more: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return await client.post("/llm/chat/completions", body)


async def breaker(kit: Kit, admin: Client) -> Any:
    await kit.service(BreakersService).sync()
    return (await admin.get(BREAKER)).json()


async def test_circuit_breakers_1_a_dead_provider_is_left_alone_until_it_recovers(kit: Kit, upstream: Any) -> None:  # noqa: F811
    admin = await kit.as_user("admin")
    assert (await breaker(kit, admin))["guarded"] is True
    upstream.otherwise = up.refuses(500)
    answers = [await ask(admin, stream=n % 2 == 0) for n in range(20)]
    assert len(upstream.requests) <= 10 + 5
    assert {answer.code for answer in answers[:10]} == {"provider_error"}
    refused = answers[-1]
    assert (refused.status, refused.code, refused.json()["breaker"]) == (503, "circuit_open", "llm:up")
    assert 28 <= int(refused.headers["retry-after"]) <= 30
    reached = len(upstream.requests)
    for _ in range(20):
        assert (await ask(admin)).code == "circuit_open"
    assert len(upstream.requests) == reached
    assert (await breaker(kit, admin))["state"] == "open"
    assert (await admin.get("/llm/providers/up")).json()["breaker"] == "open"
    assert (await admin.get("/settings/health")).json()["checks"]["llm"]["status"] == "degraded"
    upstream.otherwise = up.says("back")
    clock.travel(31)
    assert (await ask(admin, stream=True)).status == 200
    assert (await breaker(kit, admin))["state"] == "closed"


@pytest.mark.one_engine
async def test_circuit_breakers_4_bad_requests_do_not_open_it_and_refusals_for_load_do(kit: Kit, upstream: Any) -> None:  # noqa: F811
    admin = await kit.as_user("admin")
    upstream.otherwise = up.refuses(400)
    for _ in range(100):
        assert (await ask(admin)).status == 400
    found = await breaker(kit, admin)
    assert (found["state"], found["counts"]["neutral"], found["counts"]["calls"]) == ("closed", 100, 0)
    upstream.otherwise = up.refuses(429)
    for _ in range(10):
        assert (await ask(admin)).status == 429
    assert (await ask(admin)).code == "circuit_open"
    assert (await breaker(kit, admin))["state"] == "open"


async def test_llm_4_after_the_breaker_opens_only_the_fallback_is_called(kit: Kit, upstream: Any) -> None:  # noqa: F811
    admin = await kit.as_user("admin")
    world = await World().build(kit)
    changed = await world.member.patch(
        f"/agents/{world.agent_id}",
        {"llm_provider": "up", "llm_model": "m1", "config": {"fallback_models": ["scripted/echo"]}},
    )
    assert changed.status == 200, changed
    await world.task()
    lease = await world.worker.run()
    attempt = Client(kit.application.app, lease.claim["agent_token"])
    upstream.otherwise = up.refuses(500)
    for _ in range(15):
        answer = await ask(attempt, "agent")
        assert (answer.status, answer.headers["corral-model"]) == (200, "scripted/echo")
    assert len(upstream.requests) == 10
    assert (await breaker(kit, admin))["state"] == "open"
    await world.task()
    assert len(await world.worker.claim_all()) == 1  # the fallback can serve it


async def agent_status(world: World) -> tuple[str, str | None]:
    """Return the status of the agent and its reason."""
    agent = (await world.member.get(f"/agents/{world.agent_id}")).json()
    return agent["status"], agent["status_reason"]


async def test_circuit_breakers_6_tasks_wait_without_losing_an_attempt(kit: Kit, upstream: Any) -> None:  # noqa: F811
    world = await World().build(kit)
    task_id, other_id = await world.task(), await world.task("another")
    lease = await world.worker.run(max_tasks=1)
    assert lease.task_id == task_id
    attempt = Client(kit.application.app, lease.claim["agent_token"])
    upstream.otherwise = up.refuses(500)
    for _ in range(10):
        await ask(world.admin)
    assert (await ask(attempt, "agent")).code == "circuit_open"
    await kit.service(BreakersService).sync()
    retry_at = (await breaker(kit, world.admin))["retry_at"]
    await lease.ok("release", {"reason": "circuit_open"})
    task = await world.read(task_id)
    assert (task["status"], task["attempt"], task["available_at"]) == ("pending", 0, retry_at)
    claimed = (await world.worker.client.post(f"/workers/{world.worker.id}/claim", {})).json()
    assert claimed == {"tasks": [], "reason": "none", "retry_at": retry_at}  # the other task is not claimed either
    for waiting_id in (task_id, other_id):
        explained = (await world.member.get(f"/tasks/{waiting_id}/explain")).json()
        unmet = {condition["code"]: condition for condition in explained["conditions"] if not condition["ok"]}
        assert "corral circuit-breakers show llm:up" in unmet["circuit"]["unblock"]
        assert explained["claimable"] is False
    assert await agent_status(world) == ("paused", "circuit_open")
    upstream.otherwise = up.says("back")
    await world.pass_time(31)
    assert await agent_status(world) == ("idle", None)  # a task of it may try
    assert (await ask(world.admin)).status == 200  # the probe
    leases = await world.worker.claim_all(max_tasks=5)
    assert {each.task_id for each in leases} == {task_id, other_id}
    for each in leases:
        await each.ok("start")
        await each.ok("complete", {"result": {}})
        ended = await world.read(each.task_id)
        assert (ended["status"], ended["attempt"]) == ("completed", 1)


async def test_explain_says_who_forced_a_breaker_open_and_how_to_close_it(kit: Kit, upstream: Any) -> None:  # noqa: F811
    world = await World().build(kit)
    task_id = await world.task(agent_id=world.agent_id)
    lease = await world.worker.run()
    forced = await world.admin.post("/circuit-breakers/llm:up/force-open", {"reason": "The contract has ended."})
    assert forced.status == 200, forced
    await kit.service(BreakersService).sync()
    await lease.ok("release", {"reason": "circuit_open"})
    name = world.admin.user["full_name"] or world.admin.user["email"]
    why = (
        f"{name} has forced the circuit breaker llm:up open, so it rejects calls to up/m1 until an admin closes it. "
        "Reason: The contract has ended."
    )
    for wanted in (task_id, await world.task("anybody's")):
        explained = (await world.member.get(f"/tasks/{wanted}/explain")).json()
        unmet = [each for each in explained["conditions"] if not each["ok"]]
        assert [(each["code"], each["detail"]) for each in unmet] == [("circuit", why)]
        assert unmet[0]["unblock"] == "Ask an admin to close it: corral circuit-breakers force-close llm:up"
        assert not any("can be called" in each["detail"] for each in explained["conditions"])
    (attempt,) = (await world.member.get(f"/tasks/{task_id}/explain")).json()["attempts"]
    assert (attempt["error"]["type"], attempt["error"]["message"]) == ("circuit_open", why)
    claimed = (await world.worker.client.post(f"/workers/{world.worker.id}/claim", {})).json()
    assert claimed == {"tasks": [], "reason": "none"}  # nothing tells when it will be closed
    assert (await world.admin.post("/circuit-breakers/llm:up/force-close", {})).status == 200
    await kit.service(BreakersService).sync()
    assert (await world.worker.run()).task_id == task_id


@pytest.mark.one_engine
async def test_a_waiting_claim_wakes_when_the_breaker_may_admit_a_call(kit: Kit, upstream: Any) -> None:  # noqa: F811
    world = await World().build(kit)
    await world.admin.post("/circuit-breakers", {"name": "llm:up", "wait_open_seconds": 1})
    upstream.otherwise = up.refuses(500)
    while (await ask(world.admin)).code != "circuit_open":
        pass
    await world.task()
    await kit.service(BreakersService).sync()
    async with asyncio.timeout(10):  # no event tells that the second is over
        assert len(await world.worker.claim_all(wait_seconds=20)) == 1
