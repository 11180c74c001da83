"""Administration of the fleet: changes, lists, the overview, health and metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.plugins.workers.conftest import TaskFailed

from corral import clock
from corral.events.event import emit
from corral.plugin import Settings
from corral_plugins.workers.api import Workers
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service.fleet import Fleet
from corral_plugins.workers.service.liveness import WorkerSweeps


def admin(worker: Any, call: str = "") -> str:
    return f"/admin/workers/{worker.user['id']}{call}"


@pytest.mark.one_engine
async def test_everything_is_for_admins_only(fleet: Any) -> None:
    worker, member = await fleet.worker(), await fleet.kit.as_user("member")
    for client in (worker, member):
        assert (await client.get("/admin/workers")).code == "forbidden"
        assert (await client.patch(admin(worker, "/approve"), {"is_approved": True})).code == "forbidden"
        assert (await client.patch(admin(worker), {"max_agents": 9})).code == "forbidden"
        assert (await client.delete(admin(worker))).code == "forbidden"
        assert (await client.get("/admin/registration-keys")).code == "forbidden"
        for call in ("drain", "resume", "rotate-token"):
            assert (await client.post(admin(worker, f"/{call}"))).code == "forbidden"


@pytest.mark.one_engine
async def test_viewers_read_and_auditors_do_not(fleet: Any) -> None:
    worker = await fleet.worker()
    viewer, auditor = await fleet.kit.as_user("viewer"), await fleet.kit.as_user("auditor")
    for path in ("/workers", "/workers/overview", f"/workers/{worker.user['id']}"):
        assert (await viewer.get(path)).status == 200
        assert (await auditor.get(path)).status == 403


@pytest.mark.one_engine
async def test_approving_twice_and_rejecting_twice(fleet: Any) -> None:
    worker = await fleet.worker(approve=False)
    for _ in range(2):
        answer = await fleet.approve(worker.user["id"], group="gpu")
        assert (answer.status, answer.json()["status"], answer.json()["group"]) == (200, "online", "gpu")
    assert len(await fleet.told("worker.approved")) == 1
    for _ in range(2):
        answer = await fleet.approve(worker.user["id"], is_approved=False)
        assert (answer.json()["status"], answer.json()["is_approved"]) == ("rejected", False)
    assert len(await fleet.told("worker.rejected")) == 1
    assert (
        await fleet.admin.patch("/admin/workers/01890000-0000-7000-8000-000000000000/approve", {"is_approved": True})
    ).status == 404


@pytest.mark.one_engine
async def test_after_a_rejection_a_new_token_is_issued(fleet: Any) -> None:
    worker = await fleet.worker()
    await fleet.approve(worker.user["id"], is_approved=False)
    assert (await worker.post(f"/workers/{worker.user['id']}/heartbeat")).status == 401
    refused = await fleet.admin.post(admin(worker, "/rotate-token"))
    assert (refused.code, refused.json()["current_status"]) == ("invalid_state", "rejected")
    beat = await fleet.admin.post(f"/workers/{worker.user['id']}/heartbeat")
    assert (beat.status, beat.json()["current_status"]) == (409, "rejected")
    await fleet.approve(worker.user["id"])
    fresh = fleet.client((await fleet.admin.post(admin(worker, "/rotate-token"))).json()["token"])
    assert (await fresh.post(f"/workers/{worker.user['id']}/heartbeat")).status == 200
    assert (await worker.get("/workers/overview")).status == 401


async def test_a_rotated_token_lives_sixty_seconds_more(fleet: Any) -> None:
    worker = await fleet.worker()
    answer = await fleet.admin.post(admin(worker, "/rotate-token"))
    assert answer.headers["cache-control"] == "no-store"
    fresh = fleet.client(answer.json()["token"])
    beat = f"/workers/{worker.user['id']}/heartbeat"
    assert (await worker.post(beat)).json()["commands"] == ["reregister"]
    assert (await fresh.post(beat)).json()["commands"] == []
    clock.travel(61)
    assert (await worker.post(beat)).status == 401
    assert (await fresh.post(beat)).status == 200


@pytest.mark.one_engine
async def test_drain_and_resume(fleet: Any) -> None:
    worker = await fleet.worker()
    waiting = await fleet.worker("w2", approve=False)
    for _ in range(2):
        assert (await fleet.admin.post(admin(worker, "/drain"))).json()["status"] == "draining"
    for _ in range(2):
        assert (await fleet.admin.post(admin(worker, "/resume"))).json()["status"] == "online"
    for call in ("/drain", "/resume"):
        answer = await fleet.admin.post(admin(waiting, call))
        assert (answer.code, answer.json()["current_status"]) == ("invalid_state", "pending")
    assert len(await fleet.told("worker.draining")) == 1
    clock.travel(60)
    await fleet.admin.post(admin(worker, "/drain"))
    assert (await fleet.admin.post(admin(worker, "/resume"))).json()["status"] == "offline"


async def test_patch(fleet: Any) -> None:
    worker, other = await fleet.worker(), await fleet.worker("w2")
    changed = {"name": "renamed", "group": "gpu", "labels": {"a": "b"}, "max_agents": 5}
    answer = await fleet.admin.patch(admin(worker), changed)
    assert {name: answer.json()[name] for name in changed} == changed
    assert answer.headers["etag"] == f'"{answer.json()["version"]}"'
    same = await fleet.admin.patch(admin(worker), {})
    assert same.json()["version"] == answer.json()["version"]
    stale = await fleet.admin.patch(admin(worker), {"max_agents": 1}, headers={"If-Match": '"1"'})
    assert (stale.code, stale.json()["current_version"]) == ("precondition_failed", answer.json()["version"])
    taken = await fleet.admin.patch(admin(other), {"name": "renamed"})
    assert (taken.code, taken.json()["existing_id"]) == ("duplicate", worker.user["id"])
    assert (await fleet.admin.patch(admin(worker), {"name": "embedded"})).status == 422
    assert (await fleet.admin.patch(admin(worker), {"group": None})).json()["group"] is None


async def test_delete(fleet: Any) -> None:
    worker = await fleet.worker()
    await fleet.work(fleet.tasks.add)
    await worker.post(f"/workers/{worker.user['id']}/claim")
    refused = await fleet.admin.delete(admin(worker))
    assert (refused.status, refused.code) == (409, "in_use")
    answer = await fleet.admin.delete(admin(worker, "?force=true"))
    assert (answer.status, answer.headers["corral-affected"]) == (204, "tasks=1")
    assert fleet.tasks.leases == {}
    assert (await fleet.admin.delete(admin(worker))).status == 404
    assert (await worker.get("/workers/overview")).status == 401
    assert (await fleet.admin.delete(admin(await fleet.worker("w2")))).status == 204


async def test_the_list_filters(fleet: Any) -> None:
    await fleet.worker("alpha", labels={"zone": "a", "x": "zone"})
    await fleet.worker("beta", labels={"zone": "b"}, hostname="Deep.Thought")
    gamma = await fleet.worker("gamma", approve=False)
    await fleet.approve(gamma.user["id"], group="gpu")
    await fleet.worker("delta", approve=False)

    viewer = await fleet.kit.as_user("viewer")

    async def names(query: str) -> list[str]:
        answer, shared = await fleet.admin.get(f"/admin/workers?{query}"), await viewer.get(f"/workers?{query}")
        assert (answer.status, shared.status) == (200, 200), (answer, shared)
        items = answer.json()["items"]
        assert shared.json()["items"] == [{key: item[key] for key in item if key != "last_errors"} for item in items]
        return [item["name"] for item in items]

    assert await names("") == ["delta", "gamma", "beta", "alpha"]
    assert await names("status=pending&status=offline") == ["delta"]
    assert await names("group=gpu") == ["gamma"]
    assert await names("label=zone") == ["beta", "alpha"]
    assert await names("label=zone%3Da") == ["alpha"]
    assert await names("label=zone%3Da&label=zone%3Db") == ["beta", "alpha"]
    assert await names("label=a") == []
    assert await names("search=deep") == ["beta"]
    assert (await fleet.admin.get("/admin/workers?status=dead")).status == 422


async def test_the_overview(fleet: Any) -> None:
    empty = (await fleet.admin.get("/workers/overview")).json()
    assert (empty["total"], empty["utilization"], empty["avg_cpu_percent"], empty["by_group"]) == (0, None, None, {})
    one = await fleet.worker("one", max_agents=3)
    two = await fleet.worker("two", approve=False, max_agents=1)
    await fleet.approve(two.user["id"], group="gpu")
    await fleet.worker("three", approve=False)
    await fleet.work(fleet.tasks.add)
    await fleet.work(fleet.tasks.add)
    await one.post(f"/workers/{one.user['id']}/claim")
    await one.post(f"/workers/{one.user['id']}/heartbeat", {"cpu_usage_percent": 30})
    await two.post(f"/workers/{two.user['id']}/heartbeat", {"cpu_usage_percent": 50, "disk_usage_percent": 10})
    assert (await fleet.admin.get("/workers/overview")).json() == {
        "total": 3,
        "online": 2,
        "offline": 0,
        "draining": 0,
        "pending_approval": 1,
        "rejected": 0,
        "capacity": 4,
        "active_leases": 1,
        "utilization": 0.25,
        "avg_cpu_percent": 40.0,
        "avg_memory_percent": None,
        "avg_disk_percent": 10.0,
        "queue_depth": 1,
        "oldest_pending_ms": None,
        "by_group": {
            "": {"total": 1, "online": 1, "capacity": 3, "active_leases": 1},
            "gpu": {"total": 1, "online": 1, "capacity": 1, "active_leases": 0},
        },
    }


async def test_an_alert_when_tasks_wait_for_a_worker_told_once(fleet: Any) -> None:
    sweeps = fleet.kit.kernel.container.get(WorkerSweeps)

    async def alerts() -> int:
        await sweeps.sweep_silent_workers()
        return len([alert for alert in await fleet.told("system.alert") if alert["kind"] == "no_worker"])

    fleet.tasks.oldest_ms = 59_000
    assert await alerts() == 0
    fleet.tasks.oldest_ms = 60_000
    assert [await alerts(), await alerts()] == [1, 1]
    worker = await fleet.worker()
    assert await alerts() == 1
    await fleet.admin.delete(admin(worker))
    assert await alerts() == 2


@pytest.mark.one_engine
async def test_long_silence_removes(fleet: Any) -> None:
    await fleet.worker("gone")
    kept = await fleet.worker("kept")
    await fleet.work(fleet.tasks.add)
    await kept.post(f"/workers/{kept.user['id']}/claim")
    sweeps = fleet.kit.kernel.container.get(WorkerSweeps)
    clock.travel(60)
    await sweeps.sweep_silent_workers()
    await sweeps.delete_old_workers()
    assert await fleet.work(lambda: Worker.select().count()) == 2
    clock.travel(31 * 86_400)
    await sweeps.delete_old_workers()
    assert [event["name"] for event in await fleet.told("worker.deleted")] == ["gone"]


@pytest.mark.one_engine
async def test_last_failures_are_kept(make_fleet: Any) -> None:
    fleet = await make_fleet(jobs=True)
    worker = await fleet.worker()
    worker_id = worker.user["id"]

    def fail(number: int) -> None:
        event = TaskFailed(worker_id=worker_id, error={"type": "boom", "message": f"n{number}"})
        emit(event, object=("task", worker_id))

    for number in range(12):
        await fleet.work(lambda number=number: fail(number))
    async with asyncio.timeout(60):
        while True:
            errors = (await fleet.admin.get("/admin/workers")).json()["items"][0]["last_errors"]
            if errors and errors[0]["message"] == "n11":
                break
            await asyncio.sleep(0.05)
    assert [each["message"] for each in errors] == [f"n{number}" for number in range(11, 1, -1)]
    assert errors[0]["type"] == "boom"


async def test_the_service_counts_places_exactly(fleet: Any) -> None:
    worker = await fleet.worker(max_agents=2, tools=["b.tool"], labels={"k": "v"})
    workers, worker_id = fleet.kit.kernel.container.get(Workers), worker.user["id"]
    taken = await asyncio.gather(*[fleet.work(lambda: workers.take_slot(worker_id)) for _ in range(5)])
    assert sorted(taken) == [False, False, False, True, True]
    facts = await fleet.work(lambda: workers.find(worker_id))
    assert (facts.active_leases, facts.tools, facts.labels, facts.embedded) == (2, ["b.tool"], {"k": "v"}, False)
    assert facts.can_claim
    for _ in range(3):
        await fleet.work(lambda: workers.release_slot(worker_id))
    assert [(item.id, item.active_leases) for item in await fleet.work(workers.online_workers)] == [(worker_id, 0)]
    await fleet.admin.post(admin(worker, "/drain"))
    assert not await fleet.work(lambda: workers.take_slot(worker_id))
    assert await fleet.work(lambda: workers.find("01890000-0000-7000-8000-000000000000")) is None


@pytest.mark.one_engine
async def test_health_and_metrics(fleet: Any) -> None:
    health = fleet.kit.kernel.container.get(Fleet).workers_health
    assert (await fleet.work(health))[0] == "ok"
    await fleet.work(fleet.tasks.add)
    assert await fleet.work(health) == ("down", "1 task is pending, but no worker is online.")
    worker = await fleet.worker(max_agents=3)
    await worker.post(f"/workers/{worker.user['id']}/claim")
    assert (await fleet.work(health))[0] == "ok"
    metrics = {item.name: item for item in fleet.kit.loaded("workers").contributions_to("corral_metrics")}
    read = {name: await fleet.work(item.collect) for name, item in metrics.items()}
    assert read["corral_workers"][("online",)] == 1
    assert read["corral_worker_capacity"] == {(): 3.0}
    assert read["corral_worker_leases"] == {(): 1.0}
    assert read["corral_claims_total"][("ok",)] == 1
    assert sum(read["corral_claim_seconds"][()].counts) == 1
    assert read["corral_claim_seconds"][()].total > 0


@pytest.mark.one_engine
@pytest.mark.parametrize(("holds", "wanted"), [(False, "ok"), (True, "degraded")])
async def test_a_worker_is_missed_only_if_it_held_tasks(fleet: Any, holds: bool, wanted: str) -> None:
    """One that is stopped on purpose has released its leases."""
    worker = await fleet.worker(max_agents=3)
    if holds:
        await fleet.work(fleet.tasks.add)
        await worker.post(f"/workers/{worker.user['id']}/claim")
    clock.travel(61)
    await fleet.kit.kernel.container.get(WorkerSweeps).sweep_silent_workers()
    status, told = await fleet.work(fleet.kit.kernel.container.get(Fleet).workers_health)
    assert (status, "0 online, 1 offline" in told) == (wanted, True), told
    assert told.endswith(" 1 task was running on a worker that is offline now.") == holds


@pytest.mark.one_engine
async def test_a_long_wait_beside_a_worker_with_room_is_told(fleet: Any) -> None:
    health = fleet.kit.kernel.container.get(Fleet).queue_health
    await fleet.work(fleet.tasks.add)
    fleet.tasks.oldest_ms = 61_000
    assert (await fleet.work(health))[0] == "ok"  # no worker is there: the check of workers tells
    worker = await fleet.worker(max_agents=1)
    status, told = await fleet.work(health)
    assert status == "degraded"
    assert told.startswith("A task has waited for 61 s although workers can take 1 more task. ")
    assert told.endswith(f"See why: corral tasks explain {fleet.tasks.waiting[0]}")
    fleet.tasks.oldest_ms = 59_000
    assert (await fleet.work(health))[0] == "ok"
    fleet.tasks.oldest_ms = None
    await worker.post(f"/workers/{worker.user['id']}/claim")
    assert (await fleet.work(health))[0] == "ok"


@pytest.mark.one_engine
@pytest.mark.parametrize(("heartbeat", "offline", "wanted"), [(15, 45, 45), (100, 45, 300)])
async def test_offline_is_three_heartbeats_at_least(make_fleet: Any, heartbeat: int, offline: int, wanted: int) -> None:
    from corral_plugins.workers.settings import offline_seconds

    config = {"settings.workers.heartbeat_seconds": heartbeat, "settings.workers.offline_after_seconds": offline}
    fleet = await make_fleet(config=config)
    assert offline_seconds(fleet.kit.kernel.container.get(Settings)) == wanted
