"""States: what people and leases do to them, and what a stop takes along. The other plugins are small doubles."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import pytest

from corral.errors import Unavailable
from corral.plugin import Plugin, Provide, hookimpl
from corral.testing.kit import Client, Kit
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import Agents, AgentStatistics, AttemptStatistics
from corral_plugins.agents.models import Agent
from corral_plugins.llm.api import LLM, AgentModel
from corral_plugins.tasks.api import Tasks
from corral_plugins.workers.api import WorkerFacts, Workers

WORKER = "01900000-0000-7000-8000-00000000000a"
UNAPPROVED = "01900000-0000-7000-8000-00000000000b"


class Leases:
    """A double of `Tasks`: leases in memory, slots by the real `Agents`."""

    agents: Agents | None

    def __init__(self) -> None:
        self.live: dict[str, list[str]] = {}
        self.waiting = [2, 1]
        self.released: list[tuple[str, bool, str]] = []

    def lease(self, agent_id: str, task_id: str) -> bool:
        assert self.agents is not None
        if not self.agents.take_slot(agent_id):
            return False
        self.live.setdefault(agent_id, []).append(task_id)
        return True

    def end(self, agent_id: str, task_id: str) -> None:
        assert self.agents is not None
        self.live[agent_id].remove(task_id)
        self.agents.release_slot(agent_id)

    def leased_task_ids(self, agent_ids: Sequence[str]) -> dict[str, list[str]]:
        return {agent: list(tasks) for agent, tasks in self.live.items() if agent in agent_ids and tasks}

    def release_leases_of_agent(self, agent_id: str, *, cancel: bool, reason: str) -> list[str]:
        tasks = list(self.live.get(agent_id, []))
        for task in tasks:
            self.released.append((task, cancel, reason))
            self.end(agent_id, task)
        return tasks

    def detach_agent(self, agent_id: str) -> int:
        return self.waiting.pop(0) if self.waiting else 0


class Statistics:
    """A double of who keeps attempts."""

    def for_agent(self, agent_id: str, *, since: str) -> AttemptStatistics:
        return AttemptStatistics(attempts=3, completed=2, failed=1)

    def for_versions(self, agent_id: str, versions: Sequence[int]) -> dict[int, AttemptStatistics]:
        return {n: AttemptStatistics(attempts=n, success_rate=0.5, cost_usd=1.25) for n in versions}


class FakeTasks(Plugin):
    """Tasks, doubled."""

    name = "tasks"
    wants = ("agents",)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Tasks, Leases), Provide(AgentStatistics, Statistics)]


class Switch:
    """A double of `KillSwitch`."""

    def __init__(self) -> None:
        self.engaged = False

    def refuse_if_engaged(self) -> None:
        if self.engaged:
            raise Unavailable(code="kill_switch")


class FakeAdmin(Plugin):
    """Administration, doubled."""

    name = "admin"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(KillSwitch, Switch)]


class Models:
    """A double of `LLM`."""

    def is_known(self, provider: str) -> bool:
        return provider in ("bare", "ready")

    def models_for_agent(self, provider: str | None, model: str | None, fallbacks: Sequence[str]) -> list[AgentModel]:
        name = f"{provider}/{model}" if provider else model or "bare/model"
        problem = None if name.startswith("ready/") else "not configured"
        return [
            AgentModel(name=name, problem=problem, listed=not name.endswith("/unlisted"), is_provider_ready=not problem)
        ]


class FakeModels(Plugin):
    """Models, doubled."""

    name = "llm"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(LLM, Models)]


def worker(identifier: str, status: str = "online", **fields: Any) -> WorkerFacts:
    facts: dict[str, Any] = {
        "name": identifier[-1],
        "is_approved": True,
        "group": None,
        "labels": {},
        "tools": ["shell.run"],
        "max_agents": 1,
        "active_leases": 0,
        "embedded": False,
    }
    return WorkerFacts(id=identifier, status=status, **{**facts, **fields})


class Fleet:
    """A double of `Workers`."""

    def __init__(self) -> None:
        self.all = {WORKER: worker(WORKER), UNAPPROVED: worker(UNAPPROVED, "pending", is_approved=False)}
        self.asked: list[list[str]] = []

    def find(self, worker_id: str) -> WorkerFacts | None:
        return self.all.get(worker_id)

    def find_many(self, worker_ids: Sequence[str]) -> dict[str, WorkerFacts]:
        self.asked.append(list(worker_ids))
        return {each: self.all[each] for each in worker_ids if each in self.all}

    def online_workers(self) -> list[WorkerFacts]:
        return [each for each in self.all.values() if each.is_approved and each.status == "online"]


class FakeWorkers(Plugin):
    """Workers, doubled."""

    name = "workers"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Workers, Fleet)]


@pytest.fixture
async def kit(make_kit: Callable[..., Awaitable[Kit]]) -> Kit:
    return await make_kit(plugins=["agents", FakeAdmin, FakeTasks, FakeModels, FakeWorkers])


@pytest.fixture
def tasks(kit: Kit) -> Any:
    return kit.kernel.container.get(Tasks)


@pytest.fixture
def agents(kit: Kit) -> Agents:
    return kit.kernel.container.get(Agents)


@pytest.fixture
def unit(kit: Kit) -> Callable[..., Awaitable[Any]]:
    async def run(fn: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return await kit.kernel.database.work(lambda: fn(*args, **named))

    return run


async def create(client: Client, name: str = "Ada", **fields: Any) -> str:
    answer = await client.post("/agents", {"name": name, "llm_provider": "ready", **fields})
    assert answer.status == 201, answer
    return str(answer.json()["id"])


async def act(client: Client, agent: str, action: str, body: Any = None) -> tuple[str, str | None]:
    answer = await client.post(f"/agents/{agent}/{action}", body)
    assert answer.status == 200, answer
    return answer.json()["status"], answer.json()["status_reason"]


@pytest.mark.one_engine
async def test_start_pause_resume_stop(kit: Kit, alice: Client, payloads: Any) -> None:
    agent = await create(alice)
    answer = await alice.post(f"/agents/{agent}/pause")
    assert (answer.status, answer.code, answer.json()["current_status"]) == (409, "invalid_state", "offline")
    assert (await alice.post(f"/agents/{agent}/resume")).code == "invalid_state"
    assert await act(alice, agent, "stop") == ("offline", None)
    assert await act(alice, agent, "start") == ("idle", None)
    assert await act(alice, agent, "start", {}) == ("idle", None)
    assert await act(alice, agent, "resume") == ("idle", None)
    assert await act(alice, agent, "pause", {"reason": "lunch"}) == ("paused", "manual")
    assert await act(alice, agent, "pause") == ("paused", "manual")
    assert await act(alice, agent, "resume") == ("idle", None)
    assert await act(alice, agent, "pause") == ("paused", "manual")
    assert await act(alice, agent, "start") == ("idle", None)
    assert await act(alice, agent, "stop", {"reason": "home"}) == ("offline", None)
    changes = await payloads(kit, "agent.status")
    assert [(item["from"], item["to"], item["reason"]) for item in changes] == [
        ("offline", "idle", None),
        ("idle", "paused", "lunch"),
        ("paused", "idle", None),
        ("idle", "paused", "manual"),
        ("paused", "idle", None),
        ("idle", "offline", "home"),
    ]
    assert (changes[0]["agent_id"], changes[0]["name"]) == (agent, "Ada")


@pytest.mark.one_engine
async def test_leases_make_busy_and_are_capped(
    kit: Kit, alice: Client, tasks: Any, agents: Agents, unit: Any, payloads: Any
) -> None:
    agent = await create(alice, max_concurrent_tasks=2)
    assert not await unit(tasks.lease, agent, "t0")
    await act(alice, agent, "start")
    taken = await asyncio.gather(*(unit(tasks.lease, agent, f"t{n}") for n in range(5)))
    assert sum(taken) == 2
    view = (await alice.get(f"/agents/{agent}")).json()
    assert (view["status"], view["active_tasks"]) == ("busy", 2)
    assert sorted(view["current_task_ids"]) == sorted(tasks.live[agent])
    assert view["last_active_at"] is not None
    assert await act(alice, agent, "start") == ("busy", None)
    first, second = tasks.live[agent]
    await unit(tasks.end, agent, first)
    assert (await alice.get(f"/agents/{agent}")).json()["status"] == "busy"
    await unit(tasks.end, agent, second)
    assert (await alice.get(f"/agents/{agent}")).json()["status"] == "idle"
    await unit(agents.release_slot, agent)
    assert (await alice.get(f"/agents/{agent}")).json()["active_tasks"] == 0
    changes = await payloads(kit, "agent.status")
    assert [(item["from"], item["to"]) for item in changes] == [("offline", "idle"), ("idle", "busy"), ("busy", "idle")]
    figures = next(
        item for item in kit.loaded("agents").contributions_to("corral_metrics") if item.name.endswith("_total")
    )
    assert figures.collect()[("idle",)] == 2


@pytest.mark.one_engine
async def test_a_stop_revokes_all_in_one_event(kit: Kit, alice: Client, tasks: Any, unit: Any, payloads: Any) -> None:
    agent = await create(alice, max_concurrent_tasks=3)
    await act(alice, agent, "start")
    for task in ("a", "b"):
        assert await unit(tasks.lease, agent, task)
    assert await act(alice, agent, "stop") == ("offline", None)
    view = (await alice.get(f"/agents/{agent}")).json()
    assert (view["active_tasks"], view["current_task_ids"]) == (0, [])
    assert tasks.released == [("a", False, "agent_stopped"), ("b", False, "agent_stopped")]
    assert not await unit(tasks.lease, agent, "c")
    changes = await payloads(kit, "agent.status")
    assert [(item["from"], item["to"]) for item in changes][-2:] == [("idle", "busy"), ("busy", "offline")]
    await act(alice, agent, "start")
    await unit(tasks.lease, agent, "d")
    await act(alice, agent, "stop", {"mode": "immediate", "cancel_tasks": True})
    assert tasks.released[-1] == ("d", True, "agent_stopped")


@pytest.mark.one_engine
async def test_drain_lets_work_end(kit: Kit, alice: Client, tasks: Any, unit: Any, payloads: Any) -> None:
    agent = await create(alice, max_concurrent_tasks=2)
    await act(alice, agent, "start")
    await unit(tasks.lease, agent, "a")
    assert await act(alice, agent, "stop", {"mode": "drain"}) == ("draining", None)
    assert await act(alice, agent, "stop", {"mode": "drain"}) == ("draining", None)
    assert not await unit(tasks.lease, agent, "b")
    assert (await alice.post(f"/agents/{agent}/pause")).code == "invalid_state"
    assert await act(alice, agent, "start") == ("busy", None)
    await act(alice, agent, "stop", {"mode": "drain"})
    await unit(tasks.end, agent, "a")
    assert (await alice.get(f"/agents/{agent}")).json()["status"] == "offline"
    await act(alice, agent, "start")
    assert await act(alice, agent, "stop", {"mode": "drain"}) == ("offline", None)
    assert tasks.released == []
    assert (await payloads(kit, "agent.status"))[-3]["from"] == "draining"


@pytest.mark.one_engine
async def test_pause_lets_leases_run(alice: Client, tasks: Any, unit: Any) -> None:
    agent = await create(alice, max_concurrent_tasks=2)
    await act(alice, agent, "start")
    await unit(tasks.lease, agent, "a")
    assert await act(alice, agent, "pause") == ("paused", "manual")
    assert not await unit(tasks.lease, agent, "b")
    assert await act(alice, agent, "resume") == ("busy", None)
    await act(alice, agent, "pause")
    await unit(tasks.end, agent, "a")
    assert await act(alice, agent, "resume") == ("idle", None)


async def test_configuration_failures_in_a_row_are_an_error(
    kit: Kit, alice: Client, agents: Agents, unit: Any, payloads: Any
) -> None:
    agent = await create(alice)
    await act(alice, agent, "start")
    for failed in (True, True, False, True, True):
        await unit(agents.record_attempt_end, agent, configuration_failure=failed, stalled=False)
    assert (await alice.get(f"/agents/{agent}")).json()["status"] == "idle"
    await unit(agents.record_attempt_end, agent, configuration_failure=True, stalled=False)
    view = (await alice.get(f"/agents/{agent}")).json()
    assert (view["status"], view["status_reason"]) == ("error", "config_error")
    assert (await payloads(kit, "agent.status"))[-1]["reason"] == "config_error"
    assert (await alice.post(f"/agents/{agent}/resume")).code == "invalid_state"
    assert await act(alice, agent, "start") == ("idle", None)
    await unit(agents.record_attempt_end, agent, configuration_failure=True, stalled=False)
    assert (await alice.get(f"/agents/{agent}")).json()["status"] == "idle"


@pytest.mark.one_engine
async def test_stalls_in_a_row_do_not_pause_where_the_setting_is_off(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=["agents"], config={"settings.agents.pause_after_stalls": 0})
    alice = await kit.as_user("member")
    agent = (await alice.post("/agents", {"name": "Ada"})).json()["id"]
    await alice.post(f"/agents/{agent}/start")
    agents = kit.kernel.container.get(Agents)

    def stall() -> None:
        for _ in range(5):
            agents.record_stall(agent)

    await kit.kernel.database.work(stall)
    assert (await alice.get(f"/agents/{agent}")).json()["status"] == "idle"


async def test_pauses_that_people_do_not_end(kit: Kit, alice: Client, unit: Any) -> None:
    agent = await create(alice)

    def hold(reason: str) -> None:
        Agent.update(status="paused", status_reason=reason).where(Agent.id == agent).execute()

    await unit(hold, "budget")
    for action in ("start", "resume"):
        assert (await alice.post(f"/agents/{agent}/{action}")).code == "budget_exhausted"
    assert (await alice.post(f"/agents/{agent}/start", {"override": True})).status == 403
    admin = await kit.as_user("admin")
    assert await act(admin, agent, "start", {"override": True}) == ("idle", None)
    await unit(hold, "circuit_open")
    assert (await alice.post(f"/agents/{agent}/start")).code == "invalid_state"
    assert await act(alice, agent, "pause") == ("paused", "manual")
    await unit(hold, "stalled")
    assert await act(alice, agent, "resume") == ("idle", None)


async def test_delete_needs_force_while_it_works(
    kit: Kit, alice: Client, tasks: Any, agents: Agents, unit: Any, payloads: Any
) -> None:
    agent = await create(alice)
    await act(alice, agent, "start")
    await unit(tasks.lease, agent, "a")
    answer = await alice.delete(f"/agents/{agent}")
    assert (answer.status, answer.code, answer.json()["task_ids"]) == (409, "agent_busy", ["a"])
    answer = await alice.delete(f"/agents/{agent}?force=true")
    assert (answer.status, answer.headers["corral-affected"]) == (204, "tasks=3")
    assert tasks.released == [("a", True, "agent_deleted")]
    assert await kit.run_jobs() == 2
    assert tasks.waiting == []
    assert await unit(agents.find, agent) is None
    assert not await unit(tasks.lease, agent, "b")
    await unit(agents.release_slot, agent)
    assert (await payloads(kit, "agent.deleted")) == [{"agent_id": agent, "name": "Ada"}]
    assert (await payloads(kit, "agent.status"))[-1]["to"] == "offline"


@pytest.mark.one_engine
async def test_warnings(kit: Kit, alice: Client) -> None:
    async def warnings(name: str, **fields: Any) -> list[str]:
        agent = await create(alice, name, **fields)
        created = (await alice.get(f"/agents/{agent}")).json()["warnings"]
        assert (await alice.post(f"/agents/{agent}/start")).json()["warnings"] == created
        listed = (await alice.get("/agents?limit=1")).json()["items"][0]
        assert listed["warnings"] == created
        return list(created)

    assert await warnings("a") == []
    assert await warnings("b", llm_provider=None) == ["provider_not_configured"]
    assert await warnings("c", llm_provider="bare") == ["provider_not_configured"]
    assert await warnings("named", llm_provider=None, llm_model="ready/m") == []
    assert await warnings("unlisted", llm_model="unlisted") == ["model_not_found"]
    assert await warnings("d", worker_id=WORKER) == []
    assert await warnings("e", worker_id=UNAPPROVED) == ["worker_not_approved"]
    assert await warnings("f", worker_selector={"group": "gpu"}) == ["worker_offline"]
    wanted = ["shell.run", "shell.*", "http.fetch", "mcp.*"]
    assert await warnings("g", enabled_tools=wanted) == ["tool_unavailable:http.fetch", "tool_unavailable:mcp.*"]
    fleet: Any = kit.kernel.container.get(Workers)
    fleet.all[WORKER] = worker(WORKER, "offline")
    assert await warnings("h", worker_id=WORKER) == ["worker_offline"]
    fleet.all[WORKER] = worker(WORKER, tools=None, group="gpu", labels={"zone": "a", "os": "linux"})
    selected = {"group": "gpu", "labels": {"zone": "a"}}
    assert await warnings("i", enabled_tools=["http.fetch"], worker_selector=selected) == []
    fleet.all[WORKER] = worker(WORKER, tools=[])
    assert await warnings("none", enabled_tools=["http.fetch"]) == ["tool_unavailable:http.fetch"]
    fleet.asked.clear()
    assert len((await alice.get("/agents")).json()["items"]) == 12
    assert fleet.asked == [[WORKER, UNAPPROVED]]
    answer = await alice.post("/agents", {"name": "j", "llm_provider": "unheard"})
    assert (answer.status, answer.code) == (422, "unknown_reference")


async def test_eligible_and_facts(alice: Client, tasks: Any, agents: Agents, unit: Any) -> None:
    plain = await create(alice, "plain", max_concurrent_tasks=2, system_prompt="one", role="writer")
    bound = await create(alice, "bound", worker_id=WORKER)
    elsewhere = await create(alice, "elsewhere", worker_id=UNAPPROVED)
    chosen = await create(alice, "chosen", worker_selector={"group": "gpu", "labels": {"zone": "a"}})
    stopped = await create(alice, "stopped")
    for agent in (plain, bound, elsewhere, chosen):
        await act(alice, agent, "start")

    async def eligible(group: str | None = None, labels: Any = None, ids: Any = None) -> list[str]:
        found = await unit(agents.eligible_agents, worker_id=WORKER, group=group, labels=labels or {}, agent_ids=ids)
        return [facts.name for facts in found]

    assert sorted(await eligible()) == ["bound", "plain"]
    assert sorted(await eligible("gpu")) == ["bound", "plain"]
    assert sorted(await eligible("gpu", {"zone": "a", "os": "x"})) == ["bound", "chosen", "plain"]
    assert await eligible(ids=[plain, stopped]) == ["plain"]
    await unit(tasks.lease, bound, "a")
    await unit(tasks.lease, plain, "b")
    assert await eligible() == ["plain"]
    facts = await unit(agents.find, plain)
    assert (facts.system_prompt, facts.version, facts.status, facts.active_tasks) == ("one", 1, "busy", 1)
    assert (facts.can_claim, facts.worker_group, facts.config["max_steps"]) == (True, None, 25)
    await alice.patch(f"/agents/{plain}", {"system_prompt": "two"})
    found = await unit(agents.find_many, [plain, stopped, WORKER])
    assert {facts.name: facts.version for facts in found.values()} == {"plain": 2, "stopped": 1}
    assert found[plain].system_prompt == "two"
    assert await unit(agents.has_role, "writer")
    assert not await unit(agents.has_role, "painter")
    assert await unit(agents.find_many, []) == {}


@pytest.mark.one_engine
async def test_figures_come_from_who_keeps_attempts(alice: Client) -> None:
    agent = await create(alice)
    stats = (await alice.get(f"/agents/{agent}/stats")).json()
    assert (stats["days"], stats["attempts"], stats["completed"], stats["stalls"]) == (30, 3, 2, None)
    (version,) = (await alice.get(f"/agents/{agent}/versions")).json()["items"]
    assert (version["attempts"], version["success_rate"], version["cost_usd"]) == (1, 0.5, 1.25)


async def test_parallel_stop_and_claims_leave_nothing_leased(alice: Client, tasks: Any, unit: Any) -> None:
    agent = await create(alice, max_concurrent_tasks=50)
    await act(alice, agent, "start")
    claims = [unit(tasks.lease, agent, f"t{n}") for n in range(20)]
    await asyncio.gather(*claims[:10], alice.post(f"/agents/{agent}/stop"), *claims[10:])
    view = (await alice.get(f"/agents/{agent}")).json()
    assert view["status"] == "offline"
    assert view["active_tasks"] == 0


async def test_nothing_starts_while_the_kill_switch_is_engaged(kit: Kit, alice: Client) -> None:
    agent, other = await create(alice), await create(alice, "Bea")
    await act(alice, agent, "start")
    await act(alice, agent, "pause")
    switch: Any = kit.kernel.container.get(KillSwitch)
    switch.engaged = True
    for answer in (await alice.post(f"/agents/{other}/start"), await alice.post(f"/agents/{agent}/resume")):
        assert (answer.status, answer.code) == (503, "kill_switch")
    assert await act(alice, agent, "stop") == ("offline", None)
    switch.engaged = False
    assert await act(alice, other, "start") == ("idle", None)
