"""What attempts used, what agents came to, and results that come late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import World

from corral import clock
from corral.plugin import Settings
from corral.testing.kit import Client
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.service import statistics
from corral_plugins.tasks.service.statistics import TaskMetrics
from corral_plugins.workers import settings as of_workers

SCRIPTS = {"mine": {"turns": [{"text": "hello", "usage": {"prompt_tokens": 30, "completion_tokens": 4}}]}}
CHAT = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.one_engine
async def test_calls_of_the_gateway_are_the_task_s(make_kit: Callable[..., Any]) -> None:
    config = {"plugins.llm": {"scripts": SCRIPTS}, "settings.llm.default_model": "scripted/mine"}
    kit = await make_kit(plugins=("admin", "agents", "workers", "tasks", "cost", "llm"), config=config)
    world = await World().build(kit)
    task_id = await world.task()
    lease = await world.worker.run()
    agent = Client(kit.application.app, lease.claim["agent_token"])
    for _ in range(2):
        answer = await agent.post("/llm/chat/completions", CHAT)
        assert answer.status == 200, answer
    # what the worker tells comes on top, as totals
    told = {"usage": {"input_tokens": 5, "output_tokens": 1, "calls": 1, "cost_usd": 0.5}}
    await lease.ok("progress", told)
    await lease.ok("progress", told)
    assert (await world.admin.post("/admin/kill-switch", {"engaged": True, "reason": "a drill"})).status == 200
    for path, body in (("chat/completions", CHAT), ("embeddings", {"model": "scripted/mine", "input": "x"})):
        for caller in (agent, world.member):
            stopped = await caller.post(f"/llm/{path}", body)
            assert (stopped.status, stopped.code) == (503, "kill_switch"), stopped
    await lease.ok("complete", {"result": 1, **told})
    cost = (await world.read(task_id))["cost"]
    assert (cost["input_tokens"], cost["output_tokens"], cost["calls"]) == (65, 9, 3)
    assert (cost["cost_usd"], cost["unpriced_tokens"]) == (0.5, 0)  # the scripted model is free
    usage = (await world.member.get(f"/tasks/{task_id}/attempts/1")).json()["usage"]
    assert usage == {"input_tokens": 65, "output_tokens": 9, "calls": 3, "unpriced_tokens": 0}


async def test_figures_of_agents(world: Any) -> None:
    agent = f"/agents/{world.agent_id}"
    empty = (await world.member.get(f"{agent}/stats?days=7")).json()
    assert (empty["attempts"], empty["success_rate"], empty["p95_duration_ms"], empty["cost_usd"]) == (0, None, None, 0)
    used = {"usage": {"input_tokens": 10, "output_tokens": 2, "cost_usd": 0.25}}
    for seconds in (1, 2, 30):
        await world.task()
        lease = await world.worker.run()
        clock.travel(seconds)
        await lease.ok("complete", {"result": None, **used})
    await world.task(retry_policy={"max_attempts": 1})
    await (await world.worker.run()).ok("fail", {"error": {"type": "x"}})
    await world.task()
    await (await world.worker.run()).ok("release")
    stats = (await world.member.get(f"{agent}/stats?days=7")).json()
    assert (stats["attempts"], stats["completed"], stats["failed"], stats["success_rate"]) == (5, 3, 1, 0.75)
    assert (stats["cost_usd"], stats["input_tokens"], stats["output_tokens"]) == (0.75, 30, 6)
    assert 30_000 <= stats["p95_duration_ms"] < 32_000
    assert 8_000 <= stats["avg_duration_ms"] < 9_500
    assert stats["stalls"] == 0
    first = (await world.member.get(f"{agent}/versions")).json()["items"][-1]
    assert (first["attempts"], first["success_rate"], first["cost_usd"]) == (5, 0.75, 0.75)
    clock.travel(8 * 86_400)
    world.member = await world.kit.sign_in(world.member.user["email"])
    assert (await world.member.get(f"{agent}/stats?days=7")).json()["attempts"] == 0


async def test_of_many_attempts_the_newest_are_looked_at(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "NEWEST", 3)
    agent = f"/agents/{world.agent_id}"

    async def run(times: int) -> list[int | None]:
        for _ in range(times):
            await world.task()
            await (await world.worker.run()).ok("complete", {"result": None})
        return [each["attempts"] for each in (await world.member.get(f"{agent}/versions")).json()["items"]]

    assert await run(2) == [2]
    assert (await world.member.patch(agent, {"system_prompt": "Be brief."})).status == 200
    assert await run(0) == [0, 2]
    assert await run(2) == [2, 1]
    assert await run(1) == [3, None]  # of the old version nothing is known any more
    assert (await world.member.get(f"{agent}/stats")).json()["attempts"] == 3


async def test_stalls_are_counted(world: Any) -> None:
    await world.task(stall_policy={"loop_repeats": 2, "stall_seconds": 0})
    lease = await world.worker.run()
    for _ in range(3):
        await lease.ok("progress", {"signature": "same"})
    await lease.ok("complete", {"result": None})
    assert (await world.member.get(f"/agents/{world.agent_id}/stats")).json()["stalls"] == 1


def test_the_setting_of_late_results_is_that_of_workers() -> None:
    assert declared.ACCEPT_LATE_RESULTS == of_workers.ACCEPT_LATE_RESULTS


async def test_late_results_count_if_the_setting_says_so(world: Any, monkeypatch: Any) -> None:
    settings: Any = world.kit.kernel.container.get(Settings)
    read = type(settings).get
    name = declared.ACCEPT_LATE_RESULTS.name
    schema = {"type": "object"}
    for accepted in (False, True):
        monkeypatch.setattr(
            type(settings), "get", lambda self, which, on=accepted: on if which.name == name else read(self, which)
        )
        for result, status in (({}, "completed" if accepted else "cancelled"), (3, "cancelled")):
            task_id = await world.task(output_schema=schema)
            lease = await world.worker.run()
            await world.member.post(f"/tasks/{task_id}/cancel", {"reason": "no"})
            await lease.ok("complete", {"result": result})
            task = await world.read(task_id)
            assert (task["status"], task["cancel_kind"]) == (status, None if status == "completed" else "user")


async def test_durations_are_counted_in_buckets(world: Any) -> None:
    """How long things waited, ran and took to be cancelled, in this process."""
    await world.task()
    clock.travel(100)
    lease = await world.worker.run()
    clock.travel(20)
    await lease.ok("complete", {"result": None})
    cancelled = await world.task()
    lease = await world.worker.run()
    await world.member.post(f"/tasks/{cancelled}/cancel")
    clock.travel(3)
    await lease.ok("cancelled")
    metrics = world.kit.kernel.container.get(TaskMetrics)
    for histogram, values in (
        (metrics.queue_time_histogram, [100, 0]),
        (metrics.duration_histogram, [20]),
        (metrics.cancel_time_histogram, [3]),
    ):
        observed = histogram.read()[()]
        assert sum(observed.counts) == len(values)
        assert abs(observed.total - sum(values)) < 10  # a busy machine adds to it
