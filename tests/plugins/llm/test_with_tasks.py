"""The gateway with real leases: attempt tokens, worker tokens with `Corral-Lease`, task costs, revocation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import within
from tests.plugins.llm import conftest as up
from tests.plugins.tasks.conftest import Lease, World

from corral import clock
from corral.http import idempotency
from corral.testing.kit import Answer, Client
from corral_core.event_log.jobs import delete_old_jobs
from corral_plugins.llm.models import LlmCall


@pytest.fixture
async def world(make_kit: Callable[..., Any], providers: dict[str, Any]) -> World:
    config = {"plugins.llm": {"providers": providers}, "settings.llm.default_model": "up/m1"}
    kit = await make_kit(plugins=("admin", "agents", "cost", "llm", "tasks", "workers"), config=config)
    return await World().build(kit)


async def run(world: World) -> Lease:
    await world.task()
    return await world.worker.run()


async def ask(client: Client, model: str = "agent", **headers: str) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/llm/chat/completions", body, headers=sent)


def attempt(lease: Lease) -> Client:
    return Client(lease.world.kit.application.app, lease.claim["agent_token"])


async def rows(world: World) -> list[Any]:
    found: list[Any] = await world.kit.kernel.database.work(
        lambda: list(LlmCall.select().order_by(LlmCall.id)), read=True
    )
    return found


@pytest.mark.one_engine
async def test_a_worker_that_names_its_lease_acts_as_the_attempt(world: World, upstream: Any) -> None:
    lease = await run(world)
    worker = world.worker.client
    assert (await ask(worker)).status == 403  # a worker as such calls no model
    first = await ask(worker, corral_lease=lease.lease_id, idempotency_key="task:1")
    assert first.status == 200, first
    again = await ask(attempt(lease), idempotency_key="task:1")  # the scope is the task, whoever asks for it
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == first.json()
    (row,) = await rows(world)
    assert (row.task_id, row.lease_id, row.agent_id) == (lease.task_id, lease.lease_id, world.agent_id)
    assert len(upstream.requests) == 1


async def test_llm_7_answers_of_steps_are_kept_until_a_day_after_their_task(world: World) -> None:
    async def kept() -> int:
        await delete_old_jobs(world.kit.kernel.database.work, world.kit.kernel.settings)
        found = await world.kit.kernel.database.work(lambda: list(idempotency.IdempotencyRow.select()), read=True)
        return len(found)

    ended = await run(world)
    assert (await ask(attempt(ended), idempotency_key="task:1")).status == 200
    report = {"lease_id": ended.lease_id, "result": {}}
    path, key = f"/tasks/{ended.task_id}/complete", {"Idempotency-Key": "end"}
    assert (await attempt(ended).post(path, report, headers=key)).status == 200
    lease = await run(world)
    assert (await ask(attempt(lease), idempotency_key="task:1")).status == 200
    clock.travel(23 * 3600)
    assert await kept() == 3
    clock.travel(2 * 3600)
    assert await kept() == 1
    again = await ask(world.worker.client, corral_lease=lease.lease_id, idempotency_key="task:1")
    assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.one_engine
async def test_leases_of_others_and_leases_that_ended(world: World) -> None:
    lease = await run(world)
    other = await world.machine("other")
    answer = await ask(other.client, corral_lease=lease.lease_id)
    assert (answer.status, answer.code) == (403, "forbidden")
    await lease.ok("complete", {"result": {}})
    answer = await ask(world.worker.client, corral_lease=lease.lease_id)
    assert (answer.status, answer.code, answer.json()["error"]["code"]) == (409, "lease_lost", "lease_lost")


@pytest.mark.one_engine
async def test_the_cost_of_a_call_counts_for_its_task(world: World, upstream: Any) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "total_tokens": 107,
        "cost": 0.25,
        "prompt_tokens_details": {"cached_tokens": 90},
    }
    upstream.otherwise = up.says("ok", usage=usage)
    lease = await run(world)
    assert (await ask(attempt(lease))).headers["corral-cost-usd"] == "0.250000"
    cost = (await world.read(lease.task_id))["cost"]
    assert (cost["cost_usd"], cost["input_tokens"], cost["output_tokens"], cost["calls"]) == (0.25, 100, 7, 1)
    (event,) = (await world.admin.get("/cost/events")).json()["items"]
    (row,) = await rows(world)
    assert (event["usage_key"], event["task_id"], event["agent_id"]) == (row.id, lease.task_id, world.agent_id)
    assert event["attempt_id"] is not None
    assert event["user_id"] == world.member.user["id"]


async def test_a_report_cannot_take_the_key_of_a_call(world: World, upstream: Any) -> None:
    speaks = asyncio.Event()

    async def slow(exchange: up.Exchange) -> None:
        await speaks.wait()
        await exchange.json(up.completion("done", usage={"prompt_tokens": 100, "completion_tokens": 7, "cost": 12.5}))

    upstream.otherwise = slow
    lease = await run(world)
    asking = asyncio.create_task(ask(attempt(lease)))
    await upstream.asked()
    (row,) = await rows(world)
    told = {"usage_key": row.id, "provider": "up", "model": "m1", "cost_usd": 0}
    first = await attempt(lease).post("/cost/events", told)
    assert first.status == 201, first
    await lease.ok("progress", {"usage": [{"input_tokens": 1, **told}]})  # the same report: the first one stays
    speaks.set()
    assert (await asking).headers["corral-cost-usd"] == "12.500000"
    events = (await world.admin.get("/cost/events")).json()["items"]
    assert [(event["usage_key"], event["cost_usd"]) for event in events] == [(row.id, 12.5), (row.id, 0)]
    cost = (await world.read(lease.task_id))["cost"]
    assert (cost["cost_usd"], cost["input_tokens"], cost["calls"]) == (12.5, 100, 2)


async def test_llm_10_only_the_agents_model_and_nothing_after_stop(world: World, upstream: Any) -> None:
    lease = await run(world)
    agent = attempt(lease)
    assert (await ask(agent)).status == 200
    assert (await ask(agent, "up/m2")).status == 403
    upstream.otherwise = up.hangs
    asking = asyncio.create_task(ask(agent))
    await upstream.asked(2)
    await world.member.post(f"/agents/{world.agent_id}/stop", {"mode": "immediate"})
    async with within(3):
        answer = await asking  # what runs ends as well
    assert (answer.status, answer.code) == (409, "lease_lost")
    async with within(3):
        await upstream.exchanges[1].gone.wait()
    await asyncio.sleep(1)
    assert (await ask(agent)).status in (401, 409)


@pytest.mark.one_engine
async def test_a_cancelled_task_ends_its_call(world: World, upstream: Any) -> None:
    upstream.otherwise = up.hangs
    lease = await run(world)
    asking = asyncio.create_task(ask(attempt(lease)))
    await upstream.asked()
    assert (await world.member.post(f"/tasks/{lease.task_id}/cancel")).status == 202
    async with within(3):
        answer = await asking
    assert (answer.status, answer.code) == (409, "lease_lost")
    async with within(3):
        await upstream.exchanges[0].gone.wait()


@pytest.mark.one_engine
async def test_the_kill_switch_stops_calls(world: World) -> None:
    assert (await ask(world.member, "up/m1")).status == 200
    await world.admin.post("/admin/kill-switch", {"engaged": True, "reason": "test"})
    answer = await ask(world.member, "up/m1")
    assert (answer.status, answer.code) == (503, "kill_switch")


@pytest.mark.one_engine
async def test_the_kill_switch_stops_calls_admitted_before(
    make_kit: Callable[..., Any], providers: dict[str, Any], upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral_plugins.llm.service.dispatch.retry_delay", lambda tries, failure: 0.1)
    speaks, status = asyncio.Event(), 503

    async def slow(exchange: up.Exchange) -> None:
        await speaks.wait()
        await exchange.json({"error": {"message": "no"}}, status)

    providers["up"] |= {"max_concurrency": 1, "max_retries": 1}
    providers["spare"] = providers["up"]
    settings = {"settings.llm.default_model": "up/m1", "settings.llm.default_fallback_models": ["spare/m1"]}
    kit = await make_kit(plugins=("admin", "cost", "llm"), config={"plugins.llm": {"providers": providers}, **settings})
    admin = await kit.as_user("admin")
    upstream.otherwise = slow
    calls = [asyncio.create_task(ask(admin, model)) for model in ("up/m1", "up/m1")]  # the second one waits
    await upstream.asked()
    assert (await admin.post("/admin/kill-switch", {"engaged": True, "reason": "test"})).status == 200
    speaks.set()
    assert [(await call).code for call in calls] == ["kill_switch"] * 2
    assert len(upstream.requests) == 1
    speaks.clear()
    status = 404  # which is not tried again, but elsewhere
    await admin.post("/admin/kill-switch", {"engaged": False})
    call = asyncio.create_task(ask(admin, "default"))
    await upstream.asked(2)
    await admin.post("/admin/kill-switch", {"engaged": True, "reason": "test"})
    speaks.set()
    assert (await call).code == "kill_switch"
    assert len(upstream.requests) == 2
