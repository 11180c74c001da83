"""Any order of calls: only the states of the page, one live lease at most, counters that agree with the rows."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from tests.plugins.tasks.conftest import World

from corral import clock
from corral.testing.kit import make_kernel

ALLOWED = {
    (None, "pending"),
    (None, "blocked"),
    ("blocked", "pending"),
    ("blocked", "failed"),
    ("pending", "assigned"),
    ("assigned", "running"),
    ("assigned", "pending"),
    ("running", "completed"),
    ("running", "waiting"),
    ("running", "pending"),
    ("running", "failed"),
    ("waiting", "pending"),
    ("waiting", "completed"),
    ("waiting", "failed"),
    ("pending", "cancelled"),
    ("blocked", "cancelled"),
    ("waiting", "cancelled"),
    ("pending", "failed"),
    ("pending", "completed"),
    ("assigned", "cancelling"),
    ("running", "cancelling"),
    ("cancelling", "cancelled"),
    ("cancelling", "pending"),
    ("cancelling", "failed"),
    ("failed", "pending"),
    ("failed", "blocked"),
    ("cancelled", "pending"),
    ("cancelled", "blocked"),
}


class TaskMachine(RuleBasedStateMachine):
    """Drives tasks through HTTP calls in any order."""

    tasks = Bundle("tasks")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.signed_in_for = 0.0
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.folder = tempfile.TemporaryDirectory()
        self.world: Any = self.run(self._build())

    async def _build(self) -> World:
        manager = make_kernel(Path(self.folder.name), plugins=("agents", "workers", "tasks"))
        return await World().build(await self.stack.enter_async_context(manager))

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        self.run(self.stack.aclose())
        self.loop.close()
        self.folder.cleanup()
        clock.reset()

    @rule(target=tasks, priority=st.sampled_from(["low", "high"]), attempts=st.integers(1, 3))
    def create(self, priority: str, attempts: int) -> str:
        policy = {"max_attempts": attempts, "initial_seconds": 1}
        found: str = self.run(self.world.task(priority=priority, timeout_seconds=90, retry_policy=policy))
        return found

    @rule(target=tasks, needed=tasks)
    def create_dependent(self, needed: str) -> str:
        answer = self.run(self.world.member.post("/tasks", {"title": "dependent", "depends_on": [needed]}))
        assert answer.status in (201, 422), answer
        return str(answer.json()["id"]) if answer.status == 201 else needed

    @rule(target=leases)
    def claim(self) -> Any:
        found = self.run(self.world.worker.claim_all())
        return found[0] if found else None

    @rule(lease=leases, name=st.sampled_from(["start", "progress", "checkpoint"]))
    def report(self, lease: Any, name: str) -> None:
        bodies: dict[str, dict[str, Any]] = {"progress": {"percent": 1}, "checkpoint": {"step": 1, "state": None}}
        self._call(lease, name, bodies.get(name, {}))

    @rule(lease=leases, name=st.sampled_from(["complete", "fail", "release", "wait", "cancelled"]))
    def end(self, lease: Any, name: str) -> None:
        bodies: dict[str, dict[str, Any]] = {
            "fail": {"error": {"type": "x", "message": ""}},
            "wait": {"input": {"prompt": "?"}},
            "complete": {"result": 1},
        }
        self._call(lease, name, bodies.get(name, {}))

    @rule(lease=consumes(leases))
    def forget(self, lease: Any) -> None:
        """The worker dies."""

    def _call(self, lease: Any, name: str, body: dict[str, Any]) -> None:
        if lease is not None:
            answer = self.run(lease.call(name, body))
            assert answer.status in (200, 404, 409), answer

    @rule(task_id=tasks, name=st.sampled_from(["cancel", "retry", "input"]))
    def act(self, task_id: str, name: str) -> None:
        answer = self.run(self.world.member.post(f"/tasks/{task_id}/{name}", {"input": {"input": 1}}.get(name)))
        assert answer.status in (200, 202, 409), answer

    @rule(task_id=tasks, priority=st.sampled_from(["low", "critical"]))
    def patch(self, task_id: str, priority: str) -> None:
        answer = self.run(self.world.member.patch(f"/tasks/{task_id}", {"priority": priority}))
        assert answer.status in (200, 409), answer

    @rule(seconds=st.sampled_from([2, 31, 61, 95]))
    def pass_time(self, seconds: float) -> None:
        self.run(self.world.pass_time(seconds))
        self.signed_in_for += seconds
        if self.signed_in_for > 600:  # an access token lives for 15 minutes
            self.world.member = self.run(self.world.kit.sign_in(self.world.member.user["email"]))
            self.signed_in_for = 0.0

    @invariant()
    def transitions_are_those_of_the_page(self) -> None:
        for event in self.run(self.world.kit.events()):
            if event.type.startswith("task."):
                data = event.payload()
                change = (data["previous"], data["status"])
                assert data["previous"] == data["status"] or change in ALLOWED, (event.type, change)

    @invariant()
    def figures_agree(self) -> None:
        stats = self.run(self.world.member.get("/tasks/stats")).json()
        items = self.run(self.world.member.get("/tasks?limit=200")).json()["items"]
        assert stats["total"] == len(items)
        for status, n in stats["by_status"].items():
            assert n == sum(item["status"] == status for item in items)
        leased = sum(item["status"] in ("assigned", "running", "cancelling") for item in items)
        worker = self.run(self.world.member.get(f"/workers/{self.world.worker.id}")).json()
        assert worker["active_leases"] == leased == len(worker["leases"])
        assert self.run(self.world.member.get(f"/agents/{self.world.agent_id}")).json()["active_tasks"] == leased


TaskMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStates = pytest.mark.sqlite(TaskMachine.TestCase)
