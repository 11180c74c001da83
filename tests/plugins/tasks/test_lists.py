"""Lists, filters, figures, changes and who may make them."""

from __future__ import annotations

from typing import Any

import pytest

from corral import clock
from corral_plugins.tasks.service import queries


async def _ids(client: Any, query: str) -> list[str]:
    answer = await client.get(f"/tasks{query}")
    assert answer.status == 200, answer
    return [item["id"] for item in answer.json()["items"]]


async def test_pages_visit_each_task_once(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [await world.task(f"task {n}") for n in range(23)][::-1]
    assert await _ids(world.member, "?limit=200") == ids
    seen, query = [], "?limit=5"
    while query:
        page = (await world.member.get(f"/tasks{query}")).json()
        assert page["total"] == 23
        seen += [item["id"] for item in page["items"]]
        query = f"?limit=5&cursor={page['next']}" if page["next"] else ""
    assert seen == ids
    for offset in range(25):
        assert await _ids(world.member, f"?limit=4&offset={offset}") == ids[offset : offset + 4]
    both = await world.member.get(f"/tasks?offset=3&cursor={'x' * 20}")
    assert both.status == 422
    assert "input" not in page["items"][0]
    # the same by page anchors, as in large tables
    monkeypatch.setattr("corral_plugins.tasks.service.queries.NEAR_OFFSET", 0)
    monkeypatch.setattr(queries, "ANCHOR_INTERVAL", 4)
    clock.travel(120)
    world.member = await world.kit.sign_in(world.member.user["email"])
    await world.tick()
    await world.member.post(f"/tasks/{ids[20]}/cancel")
    await world.member.delete(f"/tasks/{ids[20]}")
    del ids[20]
    for offset in range(24):
        assert await _ids(world.member, f"?limit=4&offset={offset}") == ids[offset : offset + 4], offset


async def test_filters(world: Any) -> None:
    low = await world.task("find the needle", priority="low", tags=["red", "blue"])
    high = await world.task("other", priority="high", agent_id=world.agent_id, description="a needle too")
    blocked = await world.task("third", depends_on=[low])
    assert await _ids(world.member, "?priority=low") == [low]
    assert await _ids(world.member, "?priority=low&priority=high") == [high, low]
    assert await _ids(world.member, "?status=blocked") == [blocked]
    assert await _ids(world.member, "?status_filter=pending") == [high, low]
    assert await _ids(world.member, f"?agent_id={world.agent_id}") == [high]
    assert await _ids(world.member, "?search=needle") == [high, low]
    assert await _ids(world.member, "?tag=red") == [low]
    assert await _ids(world.member, f"?created_by={world.member.user['id']}&sort=priority") == [high, blocked, low]
    assert await _ids(world.member, "?sort=updated") == [blocked, high, low]
    assert (await world.member.get("/tasks?status=pending")).json()["total"] == 2
    wrong = await world.member.get("/tasks?status=none")
    assert (wrong.status, wrong.json()["errors"][0]["pointer"]) == (422, "/query/status/0")


async def test_stats_name_every_key(world: Any) -> None:
    empty = (await world.member.get("/tasks/stats")).json()
    assert len(empty["by_status"]) == 9
    assert len(empty["by_priority"]) == 4
    assert (empty["total"], empty["oldest_pending_ms"], empty["success_rate_24h"]) == (0, None, None)
    await world.task()
    await (await world.worker.run()).ok("complete", {"result": None})
    await world.task(retry_policy={"max_attempts": 1}, agent_id=world.agent_id)
    await (await world.worker.run()).ok("fail", {"error": {"type": "x", "message": ""}})
    await world.task()
    stats = (await world.member.get("/tasks/stats")).json()
    assert (stats["by_status"]["completed"], stats["by_status"]["failed"], stats["by_status"]["pending"]) == (1, 1, 1)
    assert stats["success_rate_24h"] == 0.5
    assert stats["oldest_pending_ms"] >= 0
    assert stats["avg_duration_ms"] >= 0
    of_agent = (await world.member.get(f"/tasks/stats?agent_id={world.agent_id}")).json()
    assert (of_agent["total"], of_agent["by_status"]["failed"]) == (1, 1)


async def test_patch_follows_the_state(world: Any) -> None:
    task_id = await world.task()
    first = await world.member.get(f"/tasks/{task_id}")
    assert first.headers["etag"] == '"1"'
    assert (await world.member.get(f"/tasks/{task_id}", headers={"If-None-Match": '"1"'})).status == 304
    changed = await world.member.patch(f"/tasks/{task_id}", {"title": " new ", "priority": "high", "input": {"a": 1}})
    assert (changed.json()["title"], changed.json()["version"]) == ("new", 2)
    stale = await world.member.patch(f"/tasks/{task_id}", {"title": "x"}, headers={"If-Match": '"1"'})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    assert (await world.member.patch(f"/tasks/{task_id}", {})).json()["version"] == 2
    stranger = await world.kit.as_user("member")
    assert (await stranger.patch(f"/tasks/{task_id}", {"title": "mine"})).status == 403
    assert (await world.admin.patch(f"/tasks/{task_id}", {"tags": ["seen"]})).status == 200
    viewer = await world.kit.as_user("viewer")
    assert (await viewer.get(f"/tasks/{task_id}")).status == 200
    assert (await viewer.post("/tasks", {"title": "x"})).status == 403
    lease = await world.worker.run()
    refused = await world.member.patch(f"/tasks/{task_id}", {"agent_id": world.agent_id})
    assert (refused.status, refused.code) == (409, "invalid_state")
    assert (
        await world.member.patch(f"/tasks/{task_id}", {"priority": "low", "deadline": clock.now(900)})
    ).status == 200
    await lease.ok("complete", {"result": None})
    assert (await world.member.patch(f"/tasks/{task_id}", {"title": "x"})).code == "task_terminal"
    assert (await world.member.patch(f"/tasks/{task_id}", {"metadata": {"k": 1}})).status == 200
    stats = (await world.member.get("/tasks/stats")).json()
    assert stats["by_priority"] == {"low": 1, "medium": 0, "high": 0, "critical": 0}


async def test_references_and_warnings(world: Any) -> None:
    nobody = "01890000-0000-7000-8000-000000000000"
    unknown = await world.member.post("/tasks", {"title": "x", "agent_id": nobody})
    assert (unknown.status, unknown.code, unknown.json()["errors"][0]["pointer"]) == (
        422,
        "unknown_reference",
        "/agent_id",
    )
    missing = await world.member.post("/tasks", {"title": "x", "depends_on": [nobody]})
    assert (missing.code, missing.json()["errors"][0]["pointer"]) == ("unknown_reference", "/depends_on/0")
    stopped = await world.agent("stopped", start=False)
    warned = await world.member.post("/tasks", {"title": "x", "agent_id": stopped, "required_tools": ["a.b"]})
    assert warned.json()["warnings"] == ["agent_not_started", "tool_not_enabled:a.b"]
    reviewed = await world.member.post("/tasks", {"title": "x", "review_policy": {"mode": "human"}})
    assert reviewed.json()["errors"][0]["code"] == "not_allowed"
    outward = await world.member.post("/tasks", {"title": "x", "output_schema": {"$ref": "https://example.org/x"}})
    assert outward.status == 422
    blank = await world.member.post("/tasks", {"title": "   "})
    assert blank.json()["errors"][0]["pointer"] == "/title"


async def test_claim_order(world: Any) -> None:
    late = await world.task("late", deadline=clock.now(900))
    soon = await world.task("soon", deadline=clock.now(300))
    plain = await world.task("plain")
    urgent = await world.task("urgent", priority="critical")
    tasks = await world.worker.client.get(f"/workers/{world.worker.id}/tasks")
    order = [urgent, soon, late, plain]
    assert [item["id"] for item in tasks.json()["items"]] == order
    assert [lease.task_id for lease in await world.worker.claim_all(max_tasks=10)] == order


async def test_fair_share_lets_others_go_first(make_kit: Any) -> None:
    from tests.plugins.tasks.conftest import World

    kit = await make_kit(plugins=("agents", "workers", "tasks"), config={"settings.tasks.fair_share": 0.5})
    world = await World().build(kit)
    other = await kit.as_user("member")
    mine = [await world.task(f"mine {n}") for n in range(4)]
    theirs = await world.task("theirs", by=other)
    assert (await world.worker.claim()).task_id == mine[0]
    assert (await world.worker.claim()).task_id == theirs
    assert (await world.worker.claim()).task_id == mine[1]


async def test_a_deleted_agent_leaves_its_tasks_to_anybody(world: Any) -> None:
    doomed = await world.agent("doomed", start=False)
    task_id = await world.task(agent_id=doomed)
    assert await world.worker.claim_all() == []
    assert (await world.member.delete(f"/agents/{doomed}")).status == 204
    assert (await world.worker.claim()).task_id == task_id


async def test_children_are_cancelled_with_their_parent(world: Any) -> None:
    from corral.testing.kit import Client

    parent = await world.task()
    lease = await world.worker.run()
    agent = Client(world.kit.application.app, lease.claim["agent_token"])
    child = (await agent.post("/tasks", {"title": "child"})).json()["id"]
    await world.member.post(f"/tasks/{parent}/cancel")
    task = await world.read(child)
    assert (task["status"], task["cancel_kind"]) == ("cancelled", "parent")


async def test_events_of_a_task_and_its_wait(world: Any) -> None:
    import asyncio

    task_id = await world.task()
    lease = await world.worker.run()
    waiting = asyncio.create_task(world.member.get(f"/tasks/{task_id}?wait=20"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await lease.ok("complete", {"result": 1})
    assert (await asyncio.wait_for(waiting, 60)).json()["status"] == "completed"
    for _ in range(1000):
        events = (await world.member.get(f"/tasks/{task_id}/events")).json()["items"]
        if len(events) == 4:
            break
        await asyncio.sleep(0.05)
    assert [each["event"] for each in events] == ["task.created", "task.assigned", "task.started", "task.completed"]


async def test_old_tasks_are_swept(make_kit: Any) -> None:
    from tests.plugins.tasks.conftest import World

    from corral_plugins.tasks import jobs
    from corral_plugins.tasks.service.retention import TaskRetention

    kit = await make_kit(plugins=("agents", "workers", "tasks"), config={"settings.tasks.retention_days": 10})
    world = await World().build(kit)
    old = await world.task("old")
    await world.member.post(f"/tasks/{old}/cancel")
    await world.task("open")
    clock.travel(11 * 86_400)
    await jobs.delete_expired_rows(kit.kernel.database.work, kit.kernel.container.get(TaskRetention))
    world.member = await kit.sign_in(world.member.user["email"])
    assert (await world.member.get("/tasks")).json()["total"] == 1


async def test_metrics(world: Any) -> None:
    await world.task()
    await (await world.worker.run()).ok("complete", {"result": None})
    await world.task()
    told = (await world.admin.get("/metrics")).body.decode()
    assert 'corral_tasks{status="completed"} 1' in told
    assert "corral_queue_depth 1" in told
    assert 'corral_task_attempts_total{result="completed"} 1' in told


async def test_an_executor_prepares_the_claims_that_it_handles(make_kit: Any) -> None:
    from collections.abc import Iterable

    from tests.plugins.tasks.conftest import World

    from corral.plugin import Plugin, hookimpl

    class Steps:
        def handles(self, task: dict[str, Any]) -> bool:
            return bool(task["source"]["type"] == "user")

        def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
            return {"tool": "echo", "task": task["id"]}

    class StepsPlugin(Plugin):
        """Steps that need no agent loop."""

        name = "steps"
        wants = ("tasks",)

        @hookimpl(optionalhook=True)
        def corral_task_executors(self) -> Iterable[Steps]:
            return [Steps()]

    world = await World().build(await make_kit(plugins=("agents", "workers", "tasks", StepsPlugin)))
    task_id = await world.task()
    lease = await world.worker.claim()
    assert lease.claim["agent"]["config"]["executor"] == {"tool": "echo", "task": task_id}


async def test_every_figure_is_of_the_tasks_that_are_asked_for(world: Any) -> None:
    busy, other = await world.agent("busy", max_concurrent_tasks=9), await world.agent("other")
    await world.task(agent_id=busy)
    lease = await world.worker.run()
    clock.travel(2)
    await lease.ok("complete", {"result": None})
    await world.task(agent_id=busy)
    lease = await world.worker.run()
    await lease.ok("fail", {"error": {"type": "x", "message": ""}, "retryable": False})
    await world.task(agent_id=busy)
    await (await world.worker.run()).ok("wait", {"input": {"prompt": "?"}})
    await world.task(agent_id=busy)
    clock.travel(1)
    none = {"oldest_pending_ms": None, "success_rate_24h": None, "avg_duration_ms": None, "avg_queue_ms": None}
    for query in (f"agent_id={other}", "since=2090-01-01T00:00:00Z"):
        stats = (await world.member.get(f"/tasks/stats?{query}")).json()
        assert {name: stats[name] for name in none} == none
        assert (stats["total"], stats["waiting_for"]) == (0, {"approval": 0, "input": 0, "review": 0})
    for query in (f"agent_id={busy}", "since=2020-01-01T00:00:00Z", ""):
        stats = (await world.member.get(f"/tasks/stats?{query}")).json()
        assert (stats["total"], stats["success_rate_24h"], stats["waiting_for"]["input"]) == (4, 0.5, 1)
        assert 2000 <= stats["avg_duration_ms"] < 20_000
        assert 0 <= stats["avg_queue_ms"] < 20_000
        assert 1000 <= stats["oldest_pending_ms"] < 20_000
