"""The promises of tasks. The 11th is in `test_large_table.py`.

Waiting for parts that come later: 4 (approvals; waiting for input is tested in `test_life.py`), the dead letter of 6
(dead_letter), 8 (redis). The codes `budget_*` of 7 are tested in tests/plugins/llm/test_budgets.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.limits import within
from tests.plugins.tasks.conftest import Lease, Machine, World

from corral import clock
from corral_plugins.circuit_breakers.service.breakers import BreakersService
from corral_plugins.workers.service.liveness import WorkerSweeps


async def test_tasks_1_completed_with_nothing_configured(world: Any) -> None:
    task_id = await world.task("hello")
    lease = await world.worker.run()
    await lease.ok("logs", {"entries": [{"seq": 0, "ts": clock.now(), "message": "working"}]})
    await lease.ok(
        "complete", {"result": {"text": "done"}, "usage": {"input_tokens": 3, "output_tokens": 4, "calls": 1}}
    )
    task = await world.read(task_id)
    assert (task["status"], task["attempt"], task["result"]) == ("completed", 1, {"text": "done"})
    assert task["cost"]["calls"] == 1
    assert len((await world.member.get(f"/tasks/{task_id}/logs")).json()["items"]) == 1


async def test_tasks_2_two_workers_race(world: Any, long_form: bool) -> None:
    rounds = 1000 if long_form else 60
    other = await world.machine("second", max_agents=100)
    winners = 0
    for _ in range(rounds):
        task_id = await world.task()
        found = await asyncio.gather(world.worker.claim_all(), other.claim_all())
        leases = [lease for each in found for lease in each]
        assert [lease.task_id for lease in leases] == [task_id]
        await leases[0].ok("start")
        await leases[0].ok("complete", {"result": None})
        winners += 1
        task = await world.read(task_id)
        assert (task["fence"], task["attempt"]) == (1, 1)
    assert winners == rounds


async def test_tasks_3_a_killed_worker_is_replaced_from_the_checkpoint(world: Any) -> None:
    task_id = await world.task()
    dead = await world.worker.run()
    await dead.ok("checkpoint", {"step": 7, "state": {"messages": ["so far"]}})
    await world.pass_time(60 + 5)
    other = await world.machine("second")
    heir = await other.run()
    assert heir.claim["resume"]["checkpoint"] == {"step": 7, "state": {"messages": ["so far"]}}
    assert heir.claim["attempt"] == 2
    stale = await dead.call("complete", {"result": "from the grave"})
    assert (stale.status, stale.code) == (409, "lease_lost")
    await heir.ok("complete", {"result": "alive"})
    assert (await world.read(task_id))["result"] == "alive"


async def test_tasks_5_cancel_survives_a_restart(make_kit: Any) -> None:
    plugins = ("agents", "workers", "tasks")
    world = await World().build(await make_kit(plugins=plugins))
    task_id = await world.task()
    lease = await world.worker.run()
    assert (await world.member.post(f"/tasks/{task_id}/cancel")).status == 202
    token = world.worker.client.token
    assert token is not None
    again = World()
    again.kit = await make_kit(plugins=plugins)  # another process on the same database: nothing was kept in memory
    again.worker = Machine(again, world.worker.id, token)
    again.worker.client.app = again.kit.application.app
    again.member = await again.kit.as_user("member", email="other@example.org")
    told = await again.heartbeat(Lease(again, again.worker, lease.claim))
    assert told["leases"][0]["state"] == "cancel_requested"
    await again.pass_time(60 + 5)
    assert (await again.read(task_id))["status"] == "cancelled"


async def test_tasks_6_three_attempts_with_growing_delays(world: Any) -> None:
    task_id = await world.task()
    delays = []
    for attempt in (1, 2, 3):
        lease = await world.worker.run()
        failed_at = clock.time_s()
        answer = await lease.ok("fail", {"error": {"type": "boom", "message": "no"}})
        assert answer["attempt"] == attempt
        if answer["status"] == "pending":
            delays.append(clock.parse_instant(answer["available_at"]) - failed_at)
            await world.pass_time(delays[-1] + 0.1)
    assert (await world.read(task_id))["status"] == "failed"
    assert delays[0] == pytest.approx(10, rel=0.11)
    assert delays[1] == pytest.approx(20, rel=0.11)


class Situation:
    """A started agent with one slot, an approved worker with one slot, and a task that only they can run."""

    def __init__(self, world: World, agent: str, worker: Machine) -> None:
        self.world, self.agent, self.worker = world, agent, worker
        self.others: list[Any] = []

    async def agent_is(self, **fields: Any) -> None:
        assert (await self.world.member.patch(f"/agents/{self.agent}", fields)).status == 200

    async def act(self, action: str) -> None:
        assert (await self.world.member.post(f"/agents/{self.agent}/{action}")).status == 200

    async def run_another(self, agent: str) -> None:
        await self.world.task(agent_id=agent, priority="critical")
        self.others.append(await self.worker.run())

    async def end_another(self) -> None:
        await self.others.pop().ok("complete", {"result": None})

    async def approve(self, *, approved: bool) -> None:
        path = f"/admin/workers/{self.worker.id}"
        assert (await self.world.admin.patch(f"{path}/approve", {"is_approved": approved})).status == 200
        if approved:  # the token died with the approval
            rotated = await self.world.admin.post(f"{path}/rotate-token")
            self.worker.client.token = rotated.json()["token"]

    async def kill(self, *, engaged: bool) -> None:
        body = {"engaged": engaged, "reason": "test"} if engaged else {"engaged": False}
        answer = await self.world.admin.post("/admin/kill-switch", body)
        assert answer.status == 200, answer

    async def force(self, state: str) -> None:
        """Force the circuit breaker of the only provider open, or close it."""
        answer = await self.world.admin.post(f"/circuit-breakers/llm:scripted/force-{state}", {})
        assert answer.status == 200, answer
        await self.world.kit.service(BreakersService).sync()

    async def silence(self) -> None:
        clock.travel(60)
        await self.world.kit.kernel.container.get(WorkerSweeps).sweep_silent_workers()

    async def sign_of_life(self) -> None:
        answer = await self.worker.client.post(f"/workers/{self.worker.id}/heartbeat", {})
        assert answer.status == 200, answer


Step = Callable[[Situation], Awaitable[None]]

# What makes one condition false, the code of that condition, and what makes it true again.
CONDITIONS: dict[str, tuple[Step, str, Step]] = {
    "no worker": (lambda it: it.silence(), "worker_online", lambda it: it.sign_of_life()),
    "worker without its approval": (
        lambda it: it.approve(approved=False),
        "worker_online",
        lambda it: it.approve(approved=True),
    ),
    "stopped agent": (lambda it: it.act("stop"), "agent_started", lambda it: it.act("start")),
    "missing tool": (
        lambda it: it.agent_is(enabled_tools=["other.tool"]),
        "tools_enabled",
        lambda it: it.agent_is(enabled_tools=["web.*"]),
    ),
    "model that nobody serves": (
        lambda it: it.agent_is(llm_model="openai/gpt-4o-mini"),
        "provider_configured",
        lambda it: it.agent_is(llm_model=None),
    ),
    "no worker that the selector matches": (
        lambda it: it.agent_is(worker_selector={"labels": {"zone": "elsewhere"}}),
        "worker_selector",
        lambda it: it.agent_is(worker_selector={}),
    ),
    "full capacity of the agent": (
        lambda it: it.run_another(it.agent),
        "agent_capacity",
        lambda it: it.end_another(),
    ),
    "open breaker": (lambda it: it.force("open"), "circuit", lambda it: it.force("close")),
    "kill switch": (lambda it: it.kill(engaged=True), "kill_switch", lambda it: it.kill(engaged=False)),
}


async def _false(world: Any, task_id: str) -> list[str]:
    answer = await world.member.get(f"/tasks/{task_id}/explain")
    assert answer.status == 200, answer
    told = answer.json()
    codes = [each["code"] for each in told["conditions"] if not each["ok"]]
    assert told["claimable"] == (not codes)
    assert told["summary"] == "The next free worker will claim the task." or codes
    return codes


async def _claimed_within_a_second(worker: Machine, task_id: str, cure: Callable[[], Awaitable[None]]) -> None:
    """A claim that waits gets the task as soon as the condition is true."""
    waiting = asyncio.ensure_future(worker.claim_all(wait_seconds=30))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await cure()
    async with within(1.5):  # 1 s, and what the other tests take from the processors
        leases = await waiting
    assert [lease.task_id for lease in leases] == [task_id]


@pytest.fixture
async def situation(make_kit: Any) -> Situation:
    plugins = ("admin", "agents", "circuit_breakers", "cost", "llm", "tasks", "workers")
    world = await World().build(await make_kit(plugins=plugins))
    await world.member.delete(f"/agents/{world.agent_id}")
    await world.admin.delete(f"/admin/workers/{world.worker.id}")
    agent = await world.agent("only", role="only", enabled_tools=["web.*"])
    return Situation(world, agent, await world.machine("only", max_agents=2))


@pytest.mark.one_engine
@pytest.mark.parametrize("wanted", ["agent_id", "agent_role", "anybody"])
async def test_tasks_7_explain_names_exactly_the_false_condition(situation: Situation, wanted: str) -> None:
    world, worker = situation.world, situation.worker
    ways: dict[str, dict[str, Any]] = {
        "agent_id": {"agent_id": situation.agent},
        "agent_role": {"agent_role": "only"},
        "anybody": {},
    }
    for name, (spoil, code, cure) in CONDITIONS.items():
        await spoil(situation)
        task_id = await world.task(**ways[wanted], required_tools=["web.fetch"])
        assert await _false(world, task_id) == [code], name
        if code == "worker_online":  # a claim is a sign of life, and refused without an approval
            await cure(situation)
            leases = await worker.claim_all()
        else:
            assert await worker.claim_all() == [], name
            await cure(situation)
            assert await _false(world, task_id) == [], name
            leases = await worker.claim_all()
        assert [lease.task_id for lease in leases] == [task_id], name
        await leases[0].ok("start")
        await leases[0].ok("complete", {"result": None})


async def test_tasks_7_explain_names_what_a_task_waits_for(situation: Situation) -> None:
    world, worker = situation.world, situation.worker
    needed = await world.task("needed", agent_id=situation.agent)
    dependent = await world.task("dependent", depends_on=[needed])
    assert await _false(world, dependent) == ["dependencies"]
    lease = await worker.run()
    await _claimed_within_a_second(worker, dependent, lambda: _complete(lease))
    # backoff
    await world.member.post(f"/tasks/{dependent}/complete", {"result": None})
    failing = await world.task("failing", retry_policy={"jitter": 0})
    lease = await worker.run()
    await lease.ok("fail", {"error": {"type": "boom", "message": ""}})
    assert await _false(world, failing) == ["available_at"]
    await _claimed_within_a_second(worker, failing, lambda: _travel(10.1))
    await world.member.post(f"/tasks/{failing}/complete", {"result": None})
    # input
    asking = await world.task("asking")
    await (await worker.run()).ok("wait", {"input": {"prompt": "?"}})
    assert await _false(world, asking) == ["waiting_for"]
    await _claimed_within_a_second(
        worker, asking, lambda: _ok(world.member.post(f"/tasks/{asking}/input", {"input": 1}))
    )
    await world.member.post(f"/tasks/{asking}/complete", {"result": None})
    # capacity of the worker, and the states that only a task with an agent of its own can tell
    await situation.agent_is(max_concurrent_tasks=5)
    for _ in range(2):
        await situation.run_another(situation.agent)
    full = await world.task("full", agent_id=situation.agent)
    assert await _false(world, full) == ["worker_capacity"]
    await _claimed_within_a_second(worker, full, situation.end_another)
    await situation.end_another()
    await world.member.post(f"/tasks/{full}/complete", {"result": None})
    paused = await world.task("paused", agent_id=situation.agent)
    await situation.act("pause")
    assert await _false(world, paused) == ["agent_paused"]
    await _claimed_within_a_second(worker, paused, lambda: situation.act("resume"))


async def test_tasks_7_explain_tells_an_unapproved_worker_from_no_worker(make_kit: Any) -> None:
    world = World()
    world.kit = await make_kit(plugins=("agents", "workers", "tasks"))
    world.admin, world.member = await world.kit.as_user("admin"), await world.kit.as_user("member")
    task_id = await world.task(agent_id=await world.agent("runner"))
    assert await _false(world, task_id) == ["worker_online"]
    unapproved = await world.machine("worker", approve=False)
    assert await _false(world, task_id) == ["worker_approved"]
    await world.admin.patch(f"/admin/workers/{unapproved.id}/approve", {"is_approved": True})
    assert await _false(world, task_id) == []
    await (await unapproved.run()).ok("complete", {"result": None})
    ended = (await world.member.get(f"/tasks/{task_id}/explain")).json()
    assert (ended["summary"], len(ended["attempts"])) == ("Completed after 1 claim by workers.", 1)


async def _complete(lease: Lease) -> None:
    await lease.ok("complete", {"result": None})


async def _travel(seconds: float) -> None:
    clock.travel(seconds)


async def _ok(call: Awaitable[Any]) -> None:
    assert (await call).status == 200


async def test_tasks_7_a_claim_that_waits_gets_a_task_within_a_second_of_its_time(world: Any) -> None:
    task_id = await world.task(available_at=clock.now(1))
    waiting = asyncio.create_task(world.worker.claim_all(wait_seconds=10))
    async with within(2.5):
        leases = await waiting
    assert [lease.task_id for lease in leases] == [task_id]


async def test_tasks_9_low_is_not_starved(world: Any) -> None:
    low = await world.task("low", priority="low")
    for minute in range(31):
        high = await world.task("high", priority="high")
        lease = await world.worker.run()
        await lease.ok("complete", {"result": None})
        if lease.task_id == low:
            assert minute <= 30
            return
        assert lease.task_id == high or minute > 0
        await world.pass_time(60)
        world.member = await world.kit.sign_in(world.member.user["email"])  # its access token lasts 15 minutes
    pytest.fail("the low task waited more than 30 minutes")


async def test_tasks_10_one_transition_wins(world: Any) -> None:
    task_id = await world.task()
    refused = await world.member.patch(f"/tasks/{task_id}", {"status": "completed"})
    assert (refused.status, refused.code) == (422, "use_action")
    await world.member.post(f"/tasks/{task_id}/cancel")
    for _ in range(5):
        task_id = await world.task()
        lease = await world.worker.run()
        calls = [
            lease.call("complete", {"result": n}) if n % 2 else world.member.post(f"/tasks/{task_id}/cancel")
            for n in range(50)
        ]
        answers = await asyncio.gather(*calls)
        assert all(answer.status in (200, 202, 409) for answer in answers)
        ends = [kind for kind in await world.kinds(task_id) if kind in ("task.completed", "task.cancelled")]
        assert len(ends) == 1
        attempts = (await world.member.get(f"/tasks/{task_id}/attempts")).json()["items"]
        assert len(attempts) == 1
        assert attempts[0]["finished_at"] is not None
    stats = (await world.member.get("/tasks/stats")).json()
    assert stats["total"] == 6
    assert sum(stats["by_status"].values()) == 6
