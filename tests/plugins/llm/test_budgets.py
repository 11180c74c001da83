"""Budgets over tasks, agents and the gateway: claims reserve, calls draw, and what happens when the money is used up.

A call of the model `up/m1` costs 0.007 USD, and its estimate is 0.001 USD for each token of `max_tokens`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.llm import conftest as up
from tests.plugins.tasks.conftest import Lease, World
from tests.plugins.workflows import conftest as workflows

from corral import clock
from corral.testing.kit import Answer, Client
from corral_plugins.cost.models import BudgetCounter, CostEvent, Reservation
from corral_plugins.cost.service import budget_maintenance

PRICE = {"provider": "up", "model": "*", "input_usd": 0, "output_usd": 1000}


@pytest.fixture
async def world(make_kit: Callable[..., Any], providers: dict[str, Any]) -> World:
    config = {"plugins.llm": {"providers": providers}, "settings.llm.default_model": "up/m1"}
    kit = await make_kit(plugins=("admin", "agents", "audit", "cost", "llm", "tasks", "workers"), config=config)
    world = await World().build(kit)
    assert (await world.admin.post("/cost/prices", PRICE)).status == 201
    return world


async def budget(world: World, **change: Any) -> Any:
    """Change the budget, or read it."""
    answer = await (world.admin.put("/cost/budget", change) if change else world.admin.get("/cost/budget"))
    assert answer.status == 200, answer
    return answer.json()


async def ask(client: Client, tokens: int = 10, model: str = "up/m1") -> Answer:
    """Call a model."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    return await client.post("/llm/chat/completions", body)


def attempt(lease: Lease) -> Client:
    """A client with the token of the attempt."""
    return Client(lease.world.kit.application.app, lease.claim["agent_token"])


async def claim(world: World, worker: Any = None) -> Any:
    """Claim; the whole answer."""
    worker = worker or world.worker
    answer = await worker.client.post(f"/workers/{worker.id}/claim", {})
    assert answer.status == 200, answer
    return answer.json()


def cost_of(event: CostEvent) -> int:
    """What a call cost, which is known."""
    assert event.cost_micro is not None
    return event.cost_micro


async def report(lease: Lease, usd: float, key: str) -> Any:
    """Report money that the run spent outside the gateway."""
    usage = [{"usage_key": key, "provider": "elsewhere", "model": "x", "cost_usd": usd}]
    return await lease.ok("progress", {"usage": usage})


async def unmet(world: World, task_id: str) -> list[str]:
    """The codes of the conditions that keep the task waiting."""
    explained = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    return [each["code"] for each in explained["conditions"] if not each["ok"]]


async def counters(world: World) -> list[tuple[str, int, int]]:
    """Scope, spent and reserved of each counter."""
    found = BudgetCounter.select().order_by(BudgetCounter.scope.desc())
    rows = await world.kit.work(lambda: list(found), read=True)
    return [(row.scope, row.spent_micro, row.reserved_micro) for row in rows]


async def agent_of(world: World) -> Any:
    """The agent now."""
    return (await world.member.get(f"/agents/{world.agent_id}")).json()


async def settle_down(world: World) -> None:
    """Deliver events and run the jobs that follow."""
    await world.kit.run_consumers()
    await world.kit.run_jobs()


async def test_llm_3_a_budget_for_one_call_admits_one_of_ten(world: World, upstream: Any) -> None:
    await budget(world, monthly_limit=0.012)
    answers = await asyncio.gather(*[ask(world.member) for _ in range(10)])
    assert sorted(answer.status for answer in answers) == [200] + [402] * 9
    refused = next(answer for answer in answers if answer.status == 402)
    assert (refused.code, refused.json()["scope"]) == ("budget_exceeded", "global")
    assert refused.json()["error"]["code"] == "budget_exceeded"
    passed = next(answer for answer in answers if answer.status == 200)
    assert passed.headers["corral-budget-remaining-usd"] == "0.005000"
    assert len(upstream.requests) == 1
    assert await counters(world) == [("global", 7000, 0)]


async def test_cost_2_zero_forbids_paid_calls_and_null_allows_all(world: World, upstream: Any) -> None:
    await budget(world, monthly_limit=0)
    assert (await ask(world.member)).status == 402
    assert (await ask(world.member, model="scripted/echo")).status == 200
    assert upstream.requests == []
    await budget(world, monthly_limit=None)
    assert (await ask(world.member)).status == 200
    assert len(upstream.requests) == 1


@pytest.mark.one_engine
async def test_a_model_without_a_price_can_be_refused(world: World, upstream: Any) -> None:
    (price,) = (await world.admin.get("/cost/prices?source=override")).json()["items"]
    assert (await world.admin.delete(f"/cost/prices/{price['id']}")).status == 204
    assert (await ask(world.member)).status == 200
    await budget(world, monthly_limit=0)
    assert (await ask(world.member)).status == 402
    await budget(world, monthly_limit=1)
    assert (await ask(world.member)).status == 200
    assert await counters(world) == [("global", 0, 0)]


async def claimable(world: World) -> list[str]:
    """The ids of the tasks that the worker could claim now."""
    answer = await world.worker.client.get(f"/workers/{world.worker.id}/tasks")
    return [task["id"] for task in answer.json()["items"]]


async def test_cost_1_of_ten_parallel_claims_one_is_admitted(world: World) -> None:
    workers = [world.worker, *[await world.machine(f"other-{n}", max_agents=10) for n in range(2)]]
    tasks = [await world.task() for _ in range(10)]
    await budget(world, monthly_limit=0.06)
    assert await claimable(world) == tasks[:1]
    claims = await asyncio.gather(*[claim(world, workers[n % 3]) for n in range(10)])
    assert sorted(each["reason"] for each in claims) == ["budget_exhausted"] * 9 + ["ok"]
    ((worker, admitted),) = [(workers[n % 3], each["tasks"][0]) for n, each in enumerate(claims) if each["tasks"]]
    assert await counters(world) == [("global", 0, 50_000)]
    assert await claimable(world) == []
    waiting = next(task_id for task_id in tasks if task_id != admitted["task"]["id"])
    assert ((await world.read(waiting))["status"], await unmet(world, waiting)) == ("pending", ["budget_global"])
    lease = Lease(world, worker, admitted)
    await lease.ok("start")
    assert (await ask(attempt(lease))).status == 200
    assert await counters(world) == [("global", 7000, 43_000)]
    await lease.ok("complete", {"result": {}})
    assert await counters(world) == [("global", 7000, 0)]
    events = await world.kit.work(lambda: list(CostEvent.select()), read=True)
    assert sum(map(cost_of, events)) == 7000
    assert (await claim(world))["reason"] == "ok"  # the next estimate is what the last attempt cost


async def test_parallel_work_leaves_counters_that_are_exact(world: World) -> None:
    agents = [world.agent_id, await world.agent("second", max_concurrent_tasks=100)]
    workers = [world.worker, *[await world.machine(f"other-{n}", max_agents=10) for n in range(2)]]
    tasks = [await world.task(agent_id=agents[n % 2]) for n in range(12)]
    await budget(world, monthly_limit=10)
    for agent in agents:
        changed = await world.member.put(f"/agents/{agent}/budget", {"monthly_budget_usd": 5})
        assert changed.status == 200

    async def work(n: int) -> None:
        lease = await workers[n % 3].run()
        assert (await ask(attempt(lease))).status == 200
        if n % 3 == 0:
            await report(lease, 0.001 * n, f"outside-{n}")
        assert (await ask(attempt(lease))).status == 200
        await (lease.ok("complete", {"result": {}}) if n % 4 else lease.ok("release", {"reason": "later"}))

    await asyncio.gather(*[work(n) for n in range(len(tasks))])
    spent = 2 * 7000 * len(tasks) + sum(1000 * n for n in range(0, len(tasks), 3))
    events = await world.kit.work(lambda: list(CostEvent.select()), read=True)
    assert sum(map(cost_of, events)) == spent
    of_all, *of_agents = await counters(world)
    assert of_all == ("global", spent, 0)
    assert (sum(each[1] for each in of_agents), [each[2] for each in of_agents]) == (spent, [0, 0])


@pytest.mark.one_engine
async def test_one_claim_for_many_tasks_takes_what_the_budget_admits(world: World) -> None:
    for _ in range(4):
        await world.task()
    await budget(world, monthly_limit=0.11)
    answer = await world.worker.client.post(f"/workers/{world.worker.id}/claim", {"max_tasks": 4})
    assert len(answer.json()["tasks"]) == 2
    assert await counters(world) == [("global", 0, 100_000)]


@pytest.mark.one_engine
async def test_a_task_that_is_too_expensive_does_not_hold_up_the_others(world: World) -> None:
    expensive = await world.task(max_cost_usd=5, priority="high")
    cheap = await world.task(max_cost_usd=0.01)
    await budget(world, monthly_limit=0.1)
    (taken,) = (await claim(world))["tasks"]
    assert taken["task"]["id"] == cheap
    assert await unmet(world, expensive) == ["budget_global"]


async def test_a_cost_limit_below_the_smallest_call_is_told_at_once(world: World) -> None:
    for limit, told in ((0.000001, 1), (1, 0)):
        task_id = await world.task(agent_id=world.agent_id, max_cost_usd=limit, instructions="Count the words. " * 500)
        warnings = (await world.member.get(f"/tasks/{task_id}/explain")).json()["warnings"]
        assert len(warnings) == told
        if told:
            assert warnings[0].startswith(
                "The cost limit of the task leaves $0.000001, but the smallest call to its model"
            )
            assert warnings[0].endswith(f"corral api PATCH /tasks/{task_id} -f max_cost_usd:=USD")


async def test_agents_with_free_models_pass_every_budget(world: World) -> None:
    await budget(world, monthly_limit=0)
    paid = await world.task(agent_id=world.agent_id, priority="critical")
    free_agent = await world.agent("free", llm_provider="scripted", llm_model="echo", monthly_budget_usd=0)
    free = await world.task(agent_id=free_agent)
    assert await claimable(world) == [free]
    lease = await world.worker.run()
    assert lease.task_id == free
    assert (await ask(attempt(lease), model="agent")).status == 200
    assert (await world.kit.work(lambda: Reservation.select().count(), read=True), await claim(world)) == (
        0,
        {"tasks": [], "reason": "budget_exhausted"},
    )
    assert await unmet(world, paid) == ["budget_global"]
    assert await unmet(world, await world.task(agent_id=free_agent)) == ["agent_capacity"]


async def test_cost_7_a_task_ends_at_its_cost_limit(world: World, upstream: Any) -> None:
    task = await world.task(max_cost_usd=0.01)
    lease = await world.worker.run()
    for _ in range(2):  # the second call passes the limit, because it costs more than was estimated
        assert (await ask(attempt(lease), tokens=3)).status == 200
    assert (await world.read(task))["status"] == "cancelling"
    refused = await ask(attempt(lease), tokens=3)
    assert (refused.status, refused.json()["scope"]) == (402, "task")
    assert len(upstream.requests) == 2
    await lease.ok("cancelled")
    ended = await world.read(task)
    assert (ended["status"], ended["error"]["kind"], ended["cost"]["cost_usd"]) == ("failed", "budget", 0.014)
    assert await world.kit.work(lambda: Reservation.select().count(), read=True) == 0


@pytest.mark.one_engine
async def test_a_call_beyond_the_limit_of_its_task_is_not_sent(world: World, upstream: Any) -> None:
    task = await world.task(max_cost_usd=0.01)
    lease = await world.worker.run()
    refused = await ask(attempt(lease), tokens=11)
    assert (refused.status, refused.json()["scope"], upstream.requests) == (402, "task", [])
    await lease.ok("fail", {"error": {"type": "budget_exceeded", "message": "no"}, "retryable": False})
    ended = await world.read(task)
    assert (ended["status"], ended["error"]["kind"]) == ("failed", "budget")
    (told,) = (await world.member.get(f"/tasks/{task}/explain")).json()["conditions"]
    assert (told["code"], told["ok"], f"corral api PATCH /tasks/{task} -f max_cost_usd" in told["unblock"]) == (
        "budget_task",
        False,
        True,
    )
    assert (await world.member.post(f"/tasks/{task}/retry", {})).status == 200
    spent_up = await world.task(max_cost_usd=0)
    (taken,) = (await claim(world))["tasks"]
    assert (taken["task"]["id"], await claim(world)) == (task, {"tasks": [], "reason": "budget_exhausted"})
    assert await unmet(world, spent_up) == ["budget_task"]


async def test_a_worker_is_warned_at_80_percent_of_the_limit(world: World) -> None:
    agent = await world.agent("capped", max_cost_per_task_usd=0.01)
    await world.task(agent_id=agent)
    lease = await world.worker.run()
    assert (await report(lease, 0.0079, "a"))["state"] == "ok"
    assert (await world.heartbeat(lease))["leases"][0]["state"] == "ok"
    assert (await report(lease, 0.0002, "b"))["state"] == "budget_warning"
    assert (await lease.ok("progress", {}))["state"] == "budget_warning"
    assert (await world.heartbeat(lease))["leases"][0]["state"] == "budget_warning"
    assert (await report(lease, 0.0002, "b"))["state"] == "budget_warning"  # a repeated key adds nothing
    assert (await report(lease, 0.002, "c"))["state"] == "cancel_requested"
    assert (await world.heartbeat(lease))["leases"][0]["reason"] == "budget"


@pytest.mark.one_engine
async def test_finish_running_lets_a_run_use_what_it_reserved(world: World) -> None:
    task = await world.task()
    await budget(world, monthly_limit=0.05)
    lease = await world.worker.run()
    assert (await ask(attempt(lease), tokens=40)).status == 200
    refused = await ask(attempt(lease), tokens=60)
    assert (refused.status, refused.json()["scope"]) == (402, "global")
    assert (await ask(attempt(lease), tokens=40)).status == 200
    await lease.ok("checkpoint", {"step": 1, "state": {"kept": True}})
    await lease.ok("release", {"reason": "budget_exceeded"})
    released = await world.read(task)
    assert (released["status"], released["attempt"]) == ("pending", 0)
    await world.pass_time(6)
    await world.heartbeat()
    await budget(world, monthly_limit=0.02)
    assert (await claim(world))["reason"] == "budget_exhausted"
    await budget(world, monthly_limit=1)
    (again,) = (await claim(world))["tasks"]
    assert (again["task"]["id"], again["resume"]["checkpoint"]["state"]) == (task, {"kept": True})


@pytest.mark.one_engine
async def test_cancel_running_goes_on_after_runs_that_are_ending_already(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_maintenance, "CANCEL_BATCH", 1)
    await budget(world, monthly_limit=0.11, on_exceeded="cancel_running")
    tasks = [await world.task() for _ in range(2)]
    leases = {lease.task_id: lease for lease in [await world.worker.run() for _ in tasks]}
    assert (await world.member.post(f"/tasks/{min(tasks)}/cancel", {})).status < 300
    await report(leases[max(tasks)], 0.2, "much")
    await settle_down(world)
    states = [(task["status"], task["cancel_kind"]) for task in [await world.read(task_id) for task_id in tasks]]
    assert states == [("cancelling", "user"), ("cancelling", "budget")]


async def test_cancel_running_cancels_the_runs_that_spend(world: World) -> None:
    await budget(world, monthly_limit=0.11, on_exceeded="cancel_running")
    free_agent = await world.agent("free", llm_provider="scripted", llm_model="echo")
    tasks = [await world.task(agent_id=agent) for agent in (world.agent_id, world.agent_id, free_agent)]
    leases = {lease.task_id: lease for lease in [await world.worker.run() for _ in tasks]}
    await report(leases[tasks[0]], 0.2, "much")
    await settle_down(world)
    states = [(task["status"], task["cancel_kind"]) for task in [await world.read(task_id) for task_id in tasks]]
    assert states == [("cancelling", "budget"), ("cancelling", "budget"), ("running", None)]
    await leases[tasks[0]].ok("cancelled")
    assert (await world.read(tasks[0]))["error"]["kind"] == "budget"


async def exceed_agent_budget(world: World) -> Lease:
    """Let the agent spend more than its own budget."""
    changed = await world.member.put(f"/agents/{world.agent_id}/budget", {"monthly_budget_usd": 0.1})
    assert (changed.status, changed.json()["remaining_usd"]) == (200, 0.1)
    await world.task()
    lease = await world.worker.run()
    await report(lease, 0.25, "much")
    await settle_down(world)
    return lease


async def test_cost_8_an_agent_over_its_budget_is_paused_until_the_month_ends(world: World) -> None:
    lease = await exceed_agent_budget(world)
    agent = await agent_of(world)
    assert (agent["status"], agent["status_reason"], agent["monthly_budget_usd"]) == ("paused", "budget", 0.1)
    own = (await world.member.get(f"/agents/{world.agent_id}/budget")).json()
    assert (own["spent_usd"], own["reserved_usd"], own["remaining_usd"]) == (0.25, 0, -0.15)
    assert [event.payload()["scope"] for event in await world.kit.events() if event.type == "budget.exceeded"] == [
        "agent"
    ]
    refused = await ask(attempt(lease))
    assert (refused.status, refused.json()["scope"]) == (402, "agent")
    await lease.ok("complete", {"result": {}})
    waiting = await world.task(agent_id=world.agent_id, max_cost_usd=0.05)
    assert await unmet(world, waiting) == ["agent_paused", "budget_agent"]
    explained = (await world.member.get(f"/tasks/{waiting}/explain")).json()
    paused = next(each for each in explained["conditions"] if each["code"] == "agent_paused")
    assert paused["detail"].startswith("The agent is paused, because the budget of the agent ")
    assert "corral agents edit " in paused["unblock"]
    assert "corral agents resume" not in paused["unblock"]
    assert (await world.member.post(f"/agents/{world.agent_id}/start")).code == "budget_exhausted"
    ends = clock.parse_instant((await budget(world))["period_end"])
    clock.travel(ends - clock.time_s() + 1)
    await world.kit.run_schedule("cost.period")
    world.member = await world.kit.sign_in(world.member.user["email"])
    assert (await agent_of(world))["status"] == "idle"
    await world.heartbeat()
    assert (await claim(world))["reason"] == "ok"


@pytest.mark.one_engine
async def test_raising_the_budget_of_an_agent_resumes_it(world: World) -> None:
    await (await exceed_agent_budget(world)).ok("complete", {"result": {}})
    await world.kit.run_schedule("cost.period")
    assert (await agent_of(world))["status"] == "paused"
    edited = await world.member.patch(f"/agents/{world.agent_id}", {"monthly_budget_usd": 10})
    assert (edited.status, edited.json()["config_version"]) == (200, 3)
    await world.kit.run_schedule("cost.period")
    assert (await agent_of(world))["status"] == "idle"
    await world.task()
    assert (await claim(world))["reason"] == "ok"


async def test_an_admin_can_override_the_budget_of_an_agent_until_the_month_ends(world: World) -> None:
    await (await exceed_agent_budget(world)).ok("complete", {"result": {}})
    started = await world.admin.post(f"/agents/{world.agent_id}/start", {"override": True})
    assert (started.status, started.json()["status"]) == (200, "idle")
    await world.kit.run_schedule("cost.period")
    await world.task()
    lease = await world.worker.run()
    assert (await ask(attempt(lease))).status == 200
    await settle_down(world)
    assert (await agent_of(world))["status"] == "busy"


async def test_cost_5_the_budgets_of_agents_alert_at_the_same_thresholds(world: World) -> None:
    await exceed_agent_budget(world)
    alerts = [event.payload() for event in await world.kit.events() if event.type == "budget.threshold"]
    assert [(alert["scope"], alert["threshold"]) for alert in alerts] == [("agent", n) for n in (50, 80, 100)]
    (listed,) = (await budget(world))["by_agent"]
    assert listed == {"agent_id": world.agent_id, "limit": 0.1, "spent": 0.25, "reserved": 0}
    (row,) = (await world.admin.get("/cost/by-agent")).json()["items"]
    assert row["budget"] == 0.1
    deleted = await world.member.delete(f"/agents/{world.agent_id}?force=true")
    assert (deleted.status, (await budget(world))["by_agent"]) == (204, [])


@pytest.mark.one_engine
async def test_a_fallback_reserves_anew(world: World, upstream: Any) -> None:
    agent = await world.agent("two", llm_provider="up", llm_model="m1", config={"fallback_models": ["up/m2"]})
    await world.task(agent_id=agent)
    await budget(world, monthly_limit=0.06)
    lease = await world.worker.run()
    upstream.behaviours = [up.refuses(500)]
    assert (await ask(attempt(lease), tokens=60, model="agent")).status == 200
    assert len(upstream.requests) == 2
    assert await counters(world) == [("global", 7000, 53_000)]


async def test_a_reservation_is_released_with_its_lease(world: World) -> None:
    await budget(world, monthly_limit=1)
    await world.task()
    lease = await world.worker.run()
    assert await counters(world) == [("global", 0, 50_000)]
    clock.travel(50)
    await world.heartbeat(lease)
    clock.travel(20)  # the lease was renewed, so its reservation is extended
    await world.kit.run_schedule("cost.reap")
    assert await counters(world) == [("global", 0, 50_000)]
    await world.pass_time(60)
    assert await counters(world) == [("global", 0, 0)]


@pytest.mark.one_engine
async def test_a_delegated_task_gets_what_is_left_of_its_parents_limit(world: World) -> None:
    await world.task(max_cost_usd=0.5)
    lease = await world.worker.run()
    await report(lease, 0.2, "some")
    for asked, given in ((None, 0.3), (9, 0.3), (0.1, 0.1)):
        created = await attempt(lease).post("/tasks", {"title": "part", "max_cost_usd": asked})
        assert (created.status, created.json()["max_cost_usd"]) == (201, given)


async def test_the_costs_of_a_workflow_are_those_of_its_runs(
    make_kit: Callable[..., Any], providers: dict[str, Any], upstream: Any
) -> None:
    config = {"plugins.llm": {"providers": providers}, "settings.llm.default_model": "up/m1"}
    kit = await make_kit(
        plugins=("agents", "cost", "expressions", "llm", "tasks", "workers", "workflows"), config=config
    )
    world = workflows.World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    await world.ok("POST", "/cost/prices", PRICE, by=world.admin)
    ask_model = workflows.step("ask", "llm", {"prompt": "hi", "max_tokens": 10})
    workflow = await world.workflow(ask_model, config={"max_cost_usd": 1})
    runs = [await world.until(await world.start(workflow)) for _ in range(2)]
    assert [(run["status"], run["cost_usd"]) for run in runs] == [("completed", 0.007)] * 2
    (row,) = (await world.ok("GET", "/cost/by-workflow"))["items"]
    assert (row["workflow_id"], row["cost_usd"], row["calls"]) == (workflow, 0.014, 2)
    events = (await world.ok("GET", "/cost/events", by=world.admin))["items"]
    assert {event["run_id"] for event in events} == {run["id"] for run in runs}
    await world.ok("PUT", "/cost/budget", {"monthly_limit": 0.02}, by=world.admin)
    refused = await world.until(await world.start(workflow))
    assert (refused["status"], refused["error"]["type"]) == ("failed", "budget_exceeded")
    for limit, cost, calls in ((0.005, 0.0, 2), (0.012, 0.007, 3)):
        again = workflows.step("again", "llm", {"prompt": "hi", "max_tokens": 10}, on_error="continue")
        await world.ok("PUT", "/cost/budget", {"monthly_limit": None}, by=world.admin)
        limited = await world.workflow(ask_model, again, config={"max_cost_usd": limit})
        run = await world.until(await world.start(limited))
        assert (run["status"], run["error"]["kind"], run["cost_usd"]) == ("failed", "budget", cost)
        assert len(upstream.requests) == calls
    assert await kit.work(lambda: Reservation.select().count(), read=True) == 0


async def refused_run(world: World) -> Lease:
    """Let a budget refuse a call that needs more than is left, although a run is expected to cost less."""
    lease = await world.worker.run()
    refused = await ask(attempt(lease), tokens=60)
    assert (refused.status, refused.json()["needed_usd"], refused.json()["left_usd"]) == (402, 0.06, 0.05)
    assert "which may cost $0.06: $0.05 is left" in refused.json()["detail"]
    await lease.ok("release", {"reason": "budget_exceeded"})
    return lease


@pytest.mark.one_engine
async def test_a_task_whose_call_a_budget_refused_waits_until_the_call_is_affordable(world: World) -> None:
    """The estimate of a claim is below what the call needs, so the task was claimed and released for ever."""
    task = await world.task()
    await budget(world, monthly_limit=0.05)
    await refused_run(world)
    await world.pass_time(6)
    await world.heartbeat()
    for limit in (0.05, 0.0599):
        await budget(world, monthly_limit=limit)
        assert await claim(world) == {"tasks": [], "reason": "budget_exhausted"}
        assert await unmet(world, task) == ["budget_global"]
    await budget(world, monthly_limit=0.06)
    assert await unmet(world, task) == []
    (again,) = (await claim(world))["tasks"]
    assert again["task"]["id"] == task
    assert await counters(world) == [("global", 0, 60_000)]


@pytest.mark.one_engine
async def test_the_refused_call_and_the_remedy_are_told_in_figures(world: World) -> None:
    task = await world.task()
    await budget(world, monthly_limit=0.05)
    await refused_run(world)
    await world.pass_time(6)
    told = (await world.member.get(f"/tasks/{task}/explain")).json()
    (condition,) = [each for each in told["conditions"] if not each["ok"]]
    assert condition["detail"] == (
        "The budget of the installation has $0.05 of $0.05 left, but the next model call may cost $0.06."
    )
    assert condition["unblock"] == "Ask an admin to raise it: corral cost budget set --limit 0.06"
    assert told["summary"] == condition["detail"]
    why = "The budget of the installation did not allow a model call, which may cost $0.06: $0.05 was left."
    (kept,) = told["attempts"]
    assert (kept["status"], kept["error"]["type"], kept["error"]["message"]) == ("released", "budget_exceeded", why)
    events = (await world.member.get(f"/tasks/{task}/events")).json()["items"]
    assert [reason for each in events if (reason := each["data"].get("reason")) is not None] == [why]
    assert (await world.read(task))["error"] is None


async def test_a_task_with_other_instructions_does_not_wait_for_the_refused_call(world: World) -> None:
    task = await world.task()
    await budget(world, monthly_limit=0.05)
    await refused_run(world)
    await world.pass_time(6)
    await world.heartbeat()
    assert (await world.member.patch(f"/tasks/{task}", {"title": "the same"})).status == 200
    assert await unmet(world, task) == ["budget_global"]
    assert (await world.member.patch(f"/tasks/{task}", {"instructions": "less"})).status == 200
    assert (await claim(world))["reason"] == "ok"


async def test_another_model_of_the_agent_does_not_wait_for_the_refused_call(world: World) -> None:
    task = await world.task(agent_id=world.agent_id)
    await budget(world, monthly_limit=0.05)
    await refused_run(world)
    await world.pass_time(6)
    await world.heartbeat()
    assert await unmet(world, task) == ["budget_global"]
    await world.member.patch(f"/agents/{world.agent_id}", {"llm_provider": "scripted", "llm_model": "echo"})
    assert (await claim(world))["reason"] == "ok"


@pytest.mark.one_engine
async def test_the_budget_of_an_agent_is_told_with_the_command_that_raises_it(world: World) -> None:
    task = await world.task(agent_id=world.agent_id)
    await world.member.put(f"/agents/{world.agent_id}/budget", {"monthly_budget_usd": 0.05})
    await refused_run(world)
    await world.pass_time(6)
    told = (await world.member.get(f"/tasks/{task}/explain")).json()
    (condition,) = [each for each in told["conditions"] if not each["ok"]]
    name = (await agent_of(world))["name"]
    assert condition["detail"] == (
        f"The budget of the agent {name} has $0.05 of $0.05 left, but the next model call may cost $0.06."
    )
    assert condition["unblock"] == f"Raise it: corral agents edit {name} -f monthly_budget_usd:=0.06"


@pytest.mark.one_engine
async def test_a_cap_that_no_call_fits_in_ends_the_task_though_the_budget_is_used_up_too(world: World) -> None:
    """More money would not help, so the task must not wait for it."""
    await world.task(max_cost_usd=0.05)
    await budget(world, monthly_limit=0.05)
    lease = await world.worker.run()
    refused = await ask(attempt(lease), tokens=60)
    assert (refused.status, refused.json()["scope"]) == (402, "task")
