"""The events of an object tell its states in their order, however calls and timers collide.

Only PostgreSQL runs units of work at the same time. Each round forces the interleaving that shows stale states: a first
change of an object is held just before it writes its event, and a second operation begins. The first change then ends,
and the second operation writes its own event. If it has read the object without a lock, this event tells the old state.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.plugins.tasks.conftest import Lease, Machine, World

from corral import clock
from corral.events.log import LoggedEvent
from corral.testing.kit import Client, make_kernel
from corral_plugins.tasks.service.leases import TaskLeases
from corral_plugins.tasks.service.timers import TaskTimers
from corral_plugins.workers.service.liveness import WorkerLiveness, WorkerSweeps

pytestmark = pytest.mark.postgres

PREFIXES = ("/tasks/{id}", "/agents/{id}", "/workers/{id}", "/admin/workers/{id}")
BOOM = {"error": {"type": "boom", "message": ""}}
Operation = Callable[[], Awaitable[Any]]


GATE = """
CREATE TABLE test_gate (actor_id text);
INSERT INTO test_gate VALUES (NULL);
CREATE FUNCTION test_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  PERFORM pg_advisory_xact_lock_shared(CASE WHEN NEW.actor_id = g.actor_id THEN 1 ELSE 2 END) FROM test_gate AS g;
  RETURN NEW;
END $$;
CREATE TRIGGER test_gate BEFORE INSERT ON kernel_events FOR EACH ROW EXECUTE FUNCTION test_gate()
"""


class Gate:
    """Holds back events: those of one actor until `open(1)`, all others until `open(2)`."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.execute(GATE)

    def close(self, actor_id: str) -> None:
        self._connection.execute("UPDATE test_gate SET actor_id = %s", (actor_id,))
        self._connection.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")

    def open(self, n: int) -> None:
        self._connection.execute("SELECT pg_advisory_unlock(%s)", (n,))

    def end(self) -> None:
        self._connection.close()

    async def until_blocked(self, count: int, running: asyncio.Future[Any]) -> None:
        """Wait until so many units wait for a lock, or the operation is over."""
        ends = time.monotonic() + 60
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        while self._connection.execute(waiting).fetchone()[0] < count and not running.done():  # type: ignore[index]  # a count is one row
            assert time.monotonic() < ends
            await asyncio.sleep(0.005)


class Scene(World):
    """A world with one object of each kind, and the operations on it."""

    gate: Gate
    other_admin: Client

    async def collide(self, first: Operation, second: Operation, *, by: str | None = None) -> None:
        """Begin the second operation while the first one, of the admin or another actor, has yet to write its event."""
        self.gate.close(by or self.admin.user["id"])
        try:
            one = asyncio.ensure_future(first())
            await self.gate.until_blocked(1, one)
            other = asyncio.ensure_future(second())
            await self.gate.until_blocked(1 if one.done() else 2, other)
        finally:
            self.gate.open(1)
        answers = [await one]
        self.gate.open(2)
        for answer in (*answers, await other):
            assert getattr(answer, "status", 200) < 500, answer

    async def written(self, object_id: str) -> list[LoggedEvent]:
        """The events of an object in their order."""
        return [event for event in await self.kit.events() if event.object_id == object_id]

    async def fresh_task(self, state: str) -> tuple[str, Lease | None]:
        """A task in this state, with its lease if it has one."""
        needs = [await self.task(available_at=clock.now(3000))] if state == "blocked" else []
        since: dict[str, Any] = {"available_at": clock.now(-5)} if state == "parked" else {}
        task_id = await self.task(depends_on=needs, **since)
        if state in ("pending", "parked", "blocked"):
            return task_id, None
        lease = await self.worker.claim()
        if state != "assigned":
            await lease.ok("start")
        if state == "waiting":
            await lease.ok("wait", {"input": {"prompt": "?"}})
        elif state == "cancelling":
            assert (await self.member.post(f"/tasks/{task_id}/cancel")).status == 202
        elif state == "failed":
            await lease.ok("fail", {**BOOM, "retryable": False})
        assert (await self.read(task_id))["status"] == state
        return task_id, lease

    def unit(self, part: type[Any], act: Callable[[Any], Any]) -> Awaitable[Any]:
        """Run what a job or timer does."""
        found = self.kit.kernel.container.get(part)
        return self.kit.kernel.database.work(lambda: act(found))


@pytest.fixture
async def scene(tmp_path: Path, postgres_server: Any) -> AsyncIterator[Scene]:
    url = postgres_server.unused_database_url()
    made = Scene()
    async with make_kernel(tmp_path, database_url=url, plugins=("admin", "agents", "workers", "tasks")) as kit:
        await made.build(kit)
        made.other_admin = await kit.as_user("admin")
        made.gate = Gate(url)
        yield made
        made.gate.end()
    postgres_server.drop_database(url)


def chained(events: list[LoggedEvent]) -> bool:
    """Whether each event begins with the status with which the one before it ended."""
    told = [event.payload() for event in events]
    return all(after["previous"] == before["status"] for before, after in itertools.pairwise(told))


# The operations on a task, each in the state in which it publishes something.
TASK_CALLS: dict[tuple[str, str], tuple[str, Any]] = {
    ("patch", "/tasks/{id}"): ("pending", {"title": "renamed"}),
    ("delete", "/tasks/{id}"): ("failed", None),
    ("post", "/tasks/{id}/cancel"): ("running", {}),
    ("post", "/tasks/{id}/retry"): ("failed", {}),
    ("post", "/tasks/{id}/comments"): ("running", {"body": "a word"}),
    ("post", "/tasks/{id}/input"): ("waiting", {"input": 1}),
    ("post", "/tasks/{id}/complete"): ("running", {"result": 1}),
    ("post", "/tasks/{id}/fail"): ("running", BOOM),
}
# The same for the calls under a lease.
LEASE_CALLS: dict[tuple[str, str], tuple[str, Any]] = {
    ("post", "/tasks/{id}/start"): ("assigned", {}),
    ("post", "/tasks/{id}/progress"): ("running", {"percent": 5, "usage": {"input_tokens": 3}}),
    ("post", "/tasks/{id}/complete"): ("running", {"result": 1}),
    ("post", "/tasks/{id}/fail"): ("running", BOOM),
    ("post", "/tasks/{id}/wait"): ("running", {"input": {"prompt": "?"}}),
    ("post", "/tasks/{id}/release"): ("running", {"reason": ""}),
    ("post", "/tasks/{id}/cancelled"): ("cancelling", {}),
}
AGENT_CALLS: dict[tuple[str, str], tuple[str, Any]] = {
    ("patch", "/agents/{id}"): ("idle", {"system_prompt": "other"}),
    ("delete", "/agents/{id}"): ("idle", None),
    ("post", "/agents/{id}/start"): ("offline", {}),
    ("post", "/agents/{id}/stop"): ("busy", {}),
    ("post", "/agents/{id}/pause"): ("busy", {}),
    ("post", "/agents/{id}/resume"): ("paused", {}),
    ("post", "/agents/{id}/rollback"): ("idle", {"version": 1}),
}
WORKER_CALLS: dict[tuple[str, str], tuple[str, Any]] = {
    ("post", "/workers/{id}/heartbeat"): ("online", {"labels": {"zone": "b"}}),
    ("post", "/workers/{id}/deregister"): ("online", {}),
    ("patch", "/admin/workers/{id}"): ("online", {"labels": {"zone": "c"}}),
    ("patch", "/admin/workers/{id}/approve"): ("online", {"is_approved": False}),
    ("post", "/admin/workers/{id}/drain"): ("online", {}),
    ("post", "/admin/workers/{id}/resume"): ("draining", {}),
    ("delete", "/admin/workers/{id}"): ("online", None),
}
SILENT = {
    ("post", "/tasks/{id}/logs"),
    ("post", "/tasks/{id}/checkpoint"),
    ("post", "/tasks/{id}/secrets/{name}"),
    ("post", "/agents/{id}/clone"),  # publishes the copy, which nobody knows yet
    ("put", "/agents/{id}/budget"),  # publishes `budget.changed`, about the budget
    ("post", "/agents/{id}/tokens"),
    ("delete", "/agents/{id}/tokens/{token_id}"),
    ("post", "/workers/{id}/claim"),  # tested as a collision with each kind of object
    ("post", "/admin/workers/{id}/rotate-token"),
}


async def test_the_operations_of_these_tests_are_all_that_change_an_object(scene: Scene) -> None:
    document = (await scene.member.get("/openapi.json")).json()
    found = {
        (method, path.rstrip("/").removeprefix("/api/v1"))
        for path, methods in document["paths"].items()
        for method in methods
        if method in ("post", "put", "patch", "delete")
    }
    changing = {(method, path) for method, path in found if path.startswith(PREFIXES)}
    assert changing == {*TASK_CALLS, *LEASE_CALLS, *AGENT_CALLS, *WORKER_CALLS, *SILENT}


async def test_the_events_of_a_task_are_in_the_order_of_its_states(scene: Scene) -> None:
    rounds = [(scene.member, *each) for each in TASK_CALLS.items()]
    rounds += [(scene.worker.client, *each) for each in LEASE_CALLS.items()]
    for client, (method, path), (state, body) in rounds:
        for change in ("patch", "cancel"):
            task_id, lease = await scene.fresh_task(state)
            given = {**(body or {}), "lease_id": lease.lease_id} if lease and client is not scene.member else body
            address = path.replace("{id}", task_id)
            act = functools.partial(client.request, method.upper(), address, given)
            await scene.collide(_change_task(scene, task_id, state, change), act)
            await _check_task(scene, task_id, f"{change}, then {method} {path} when {state}")
            await _end(scene, task_id)


async def test_timers_and_other_plugins_publish_no_stale_task(scene: Scene) -> None:
    passed = 61.0
    cases: list[tuple[str, Callable[[str], Awaitable[Any]]]] = [
        ("running", lambda task_id: scene.unit(TaskTimers, lambda timers: timers.end_overdue_task(task_id))),
        ("parked", lambda _: scene.unit(TaskTimers, lambda timers: timers.queue_available_tasks())),
        ("running", lambda _: scene.member.post(f"/agents/{scene.agent_id}/stop")),
        ("running", lambda _: scene.unit(TaskLeases, lambda leases: leases.cancel_all_leased(reason="all"))),
        ("pending", lambda _: scene.worker.client.post(f"/workers/{scene.worker.id}/claim", {})),
        (
            "running",
            lambda _: scene.unit(
                TaskLeases, lambda leases: leases.release_leases_of_worker(scene.worker.id, reason="test")
            ),
        ),
        (
            "pending",
            lambda _: scene.unit(TaskLeases, lambda leases: leases.cancel_tasks_of_user(scene.member.user["id"])),
        ),
    ]
    for n, (state, act) in enumerate(cases):
        for change in ("patch", "cancel"):
            task_id, _ = await scene.fresh_task(state)
            if n == 0:
                clock.travel(passed)
            await scene.collide(_change_task(scene, task_id, state, change), functools.partial(act, task_id))
            await _check_task(scene, task_id, f"{change}, then case {n}")
            await _end(scene, task_id)
            await scene.member.post(f"/agents/{scene.agent_id}/start")
            await scene.heartbeat()


async def test_the_events_of_an_agent_are_in_the_order_of_its_states(scene: Scene) -> None:
    for n, ((method, path), (state, body)) in enumerate(AGENT_CALLS.items()):
        for change in ("pause", "patch", "claim"):
            agent = await scene.agent(f"{change} {n}", start=state != "offline", max_concurrent_tasks=5)
            await scene.member.patch(f"/agents/{agent}", {"system_prompt": "first"})
            tasks = [await scene.task(agent_id=agent) for _ in range(2)]
            if state == "busy":
                await scene.worker.claim(agent_ids=[agent])
            elif state == "paused":
                await scene.member.post(f"/agents/{agent}/pause")
            address = path.replace("{id}", agent)
            act = functools.partial(scene.member.request, method.upper(), address, body)
            by = scene.worker.id if change == "claim" else None
            await scene.collide(_change_agent(scene, agent, change), act, by=by)
            what = f"{change}, then {method} {path} when {state}"
            told = [event for event in await scene.written(agent) if event.type == "agent.status"]
            states = [("offline", "offline"), *((event.payload()["from"], event.payload()["to"]) for event in told)]
            assert all(one[1] == other[0] for one, other in itertools.pairwise(states)), (what, states)
            versions = [event.payload()["version"] for event in await scene.written(agent) if "updated" in event.type]
            view = await scene.member.get(f"/agents/{agent}")
            assert versions == sorted(versions), what
            if view.status == 200:
                assert (states[-1][1], versions[-1]) == (view.json()["status"], view.json()["config_version"]), what
            for task_id in tasks:
                await _end(scene, task_id)


async def test_the_events_of_a_worker_are_in_the_order_of_its_states(scene: Scene) -> None:
    cases = [*WORKER_CALLS.items(), (("sweep", ""), ("online", None)), (("seen", ""), ("offline", None))]
    for n, ((method, path), (state, body)) in enumerate(cases):
        for change in ("group", "drain"):
            machine = await scene.machine(f"{change} {n}")
            if state == "draining":
                await scene.admin.post(f"/admin/workers/{machine.id}/drain")
            if method in ("sweep", "seen"):
                clock.travel(60)
                await scene.heartbeat()
            if state == "offline":
                await scene.unit(WorkerSweeps, lambda sweeps: sweeps.sweep_in_unit())
            await scene.collide(
                _change_worker(scene, machine, change, n), _worker_operation(scene, machine, method, path, body)
            )
            told = (await scene.written(machine.id))[-1].payload()
            found = await scene.admin.get(f"/workers/{machine.id}")
            what = f"{change}, then {method} {path} when {state}"
            if found.status == 200:
                shown = {name: found.json()[name] for name in ("name", "group", "status")}
                assert {name: told[name] for name in shown} == shown, what


def _change_task(scene: Scene, task_id: str, state: str, change: str) -> Operation:
    if state == "failed":
        return lambda: scene.admin.post(f"/tasks/{task_id}/retry")
    if change == "patch":
        return lambda: scene.admin.patch(f"/tasks/{task_id}", {"priority": "critical"})
    return lambda: scene.admin.post(f"/tasks/{task_id}/cancel")


def _change_agent(scene: Scene, agent: str, change: str) -> Operation:
    if change == "patch":
        return lambda: scene.admin.patch(f"/agents/{agent}", {"system_prompt": "second"})
    if change == "claim":
        return lambda: scene.worker.claim_all(agent_ids=[agent])
    return lambda: scene.admin.post(f"/agents/{agent}/pause")


def _change_worker(scene: Scene, machine: Machine, change: str, n: int) -> Operation:
    if change == "group":
        return lambda: scene.admin.patch(f"/admin/workers/{machine.id}", {"group": f"g{n}"})
    return lambda: scene.admin.post(f"/admin/workers/{machine.id}/drain")


def _worker_operation(scene: Scene, machine: Machine, method: str, path: str, body: Any) -> Operation:
    if method == "sweep":
        return lambda: scene.unit(WorkerSweeps, lambda sweeps: sweeps.sweep_in_unit())
    if method == "seen":
        return lambda: scene.unit(WorkerLiveness, lambda liveness: liveness._write_seen([machine.id]))
    client = scene.other_admin if path.startswith("/admin") else machine.client
    address = path.replace("{id}", machine.id) + ("?force=true" if method == "delete" else "")
    return lambda: client.request(method.upper(), address, body)


async def _check_task(scene: Scene, task_id: str, what: str) -> None:
    events = [event for event in await scene.written(task_id) if event.type.startswith("task.")]
    assert chained(events), (what, [(event.type, event.payload()["status"]) for event in events])
    found = await scene.member.get(f"/tasks/{task_id}")
    if found.status == 200:
        told, task = events[-1].payload(), found.json()
        shown = {name: task[name] for name in ("status", "title", "priority", "attempt", "worker_id")}
        assert {name: told[name] for name in shown} == shown, what


async def _end(scene: Scene, task_id: str) -> None:
    """End the task, so that no later claim takes it."""
    await scene.member.post(f"/tasks/{task_id}/complete", {"result": None})
