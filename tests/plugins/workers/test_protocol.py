"""Heartbeats, claims and signals: the calls of a worker, and the callers that may make them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.limits import within

from corral import clock
from corral.kernel import Kernel
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service.liveness import WorkerLiveness, WorkerSweeps

SILENCE = 60


def path(worker: Any, call: str = "") -> str:
    return f"/workers/{worker.user['id']}{call}"


def liveness(fleet: Any) -> WorkerLiveness:
    kernel: Kernel = fleet.kit.kernel
    return kernel.container.get(WorkerLiveness)


async def go_offline(fleet: Any) -> None:
    clock.travel(SILENCE)
    await fleet.kit.kernel.container.get(WorkerSweeps).sweep_silent_workers()


async def status(fleet: Any, worker: Any) -> str:
    row: Worker = await fleet.work(lambda: Worker.get_by_id(worker.user["id"]))
    return row.status


async def test_a_heartbeat_keeps_figures_and_tells_what_waits(fleet: Any) -> None:
    worker = await fleet.worker()
    await fleet.work(fleet.tasks.add)
    figures = {"cpu_usage_percent": 12.5, "memory_usage_percent": 50}
    answer = (await worker.post(path(worker, "/heartbeat"), figures)).json()
    assert answer.pop("server_time") <= clock.now()
    assert answer == {
        "status": "online",
        "next_heartbeat_seconds": 15,
        "pending_tasks": 1,
        "leases": [],
        "commands": [],
    }
    seen = (await worker.get(path(worker))).json()
    assert (seen["cpu_usage_percent"], seen["memory_usage_percent"], seen["disk_usage_percent"]) == (12.5, 50.0, None)
    assert seen["last_heartbeat_at"] is not None
    await worker.post(path(worker, "/heartbeat"), {"cpu_usage_percent": None})
    seen = (await worker.get(path(worker))).json()
    assert (seen["cpu_usage_percent"], seen["memory_usage_percent"]) == (None, 50.0)


@pytest.mark.one_engine
@pytest.mark.parametrize("value", [-1, 101, "many"])
async def test_figures_have_bounds(fleet: Any, value: Any) -> None:
    worker = await fleet.worker()
    answer = await worker.post(path(worker, "/heartbeat"), {"cpu_usage_percent": value})
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/cpu_usage_percent")


@pytest.mark.one_engine
async def test_a_worker_speaks_for_itself_only(fleet: Any) -> None:
    one, two = await fleet.worker("w1"), await fleet.worker("w2")
    for call in ("/heartbeat", "/claim", "/deregister"):
        assert (await one.post(path(two, call))).code == "forbidden"
    for call in ("/signals", "/tasks"):
        assert (await one.get(path(two, call))).code == "forbidden"
    assert (await one.get(path(two))).code == "not_found"
    assert (await one.get(path(one))).json()["id"] == one.user["id"]
    assert (await one.get("/workers/overview")).code == "forbidden"


@pytest.mark.one_engine
async def test_registrants_and_admins_beat_for_a_worker_and_read_its_tasks(fleet: Any) -> None:
    member, other = await fleet.kit.as_user("member"), await fleet.kit.as_user("member")
    worker = await fleet.worker(by=member)
    for client, wanted in ((member, 200), (fleet.admin, 200), (other, 403)):
        assert (await client.post(path(worker, "/heartbeat"))).status == wanted
        assert (await client.get(path(worker, "/tasks"))).status == wanted
        assert (await client.post(path(worker, "/claim"))).status == 403
        assert (await client.get(path(worker, "/signals"))).status == 403
    missing = "/workers/01890000-0000-7000-8000-000000000000"
    assert (await fleet.admin.post(f"{missing}/heartbeat")).status == 404
    assert (await fleet.admin.get(missing)).status == 404


async def test_leases_are_renewed_or_lost(fleet: Any) -> None:
    worker = await fleet.worker()
    await fleet.work(fleet.tasks.add)
    claimed = (await worker.post(path(worker, "/claim"))).json()["tasks"][0]
    lease = {"task_id": claimed["task"]["id"], "lease_id": claimed["lease_id"]}
    lost = {**lease, "lease_id": worker.user["id"]}
    answer = (await worker.post(path(worker, "/heartbeat"), {"leases": [lease, lost]})).json()
    assert [state["state"] for state in answer["leases"]] == ["ok", "lost"]
    assert answer["next_heartbeat_seconds"] == 5  # nobody listens for signals
    detail = (await worker.get(path(worker))).json()
    assert [each["lease_id"] for each in detail["leases"]] == [lease["lease_id"]]
    assert detail["active_leases"] == 1


@pytest.mark.one_engine
async def test_a_detail_is_never_answered_from_an_old_version(fleet: Any) -> None:
    worker = await fleet.worker()
    first = await worker.get(path(worker))
    await worker.post(path(worker, "/heartbeat"), {"cpu_usage_percent": 77})
    again = await worker.get(path(worker), headers={"If-None-Match": first.headers["etag"]})
    assert (again.status, again.json()["cpu_usage_percent"]) == (200, 77.0)


@pytest.mark.one_engine
async def test_other_tools_and_labels_are_told(fleet: Any) -> None:
    worker = await fleet.worker()
    before = (await worker.get(path(worker))).json()["version"]
    await worker.post(path(worker, "/heartbeat"), {"tools": ["shell.run", "shell.run"], "labels": {"a": "b"}})
    await worker.post(path(worker, "/heartbeat"), {"tools": ["shell.run"], "labels": {"a": "b"}})
    seen = (await worker.get(path(worker))).json()
    assert (seen["tools"], seen["labels"], seen["version"]) == (["shell.run"], {"a": "b"}, before + 1)
    assert [event["changed_fields"] for event in await fleet.told("worker.updated")] == [["labels", "tools"]]


@pytest.mark.one_engine
async def test_no_tools_and_unknown_tools_are_told_apart(fleet: Any) -> None:
    worker, bare = await fleet.worker(), await fleet.worker("bare", tools=[], fingerprint="f")

    async def tools(client: Any) -> Any:
        return (await client.get(path(client))).json()["tools"]

    assert (await tools(worker), await tools(bare)) == (None, [])
    for given, expected in (([], []), (None, None), (["shell.run"], ["shell.run"])):
        assert (await worker.post(path(worker, "/heartbeat"), {"tools": given})).status == 200
        assert await tools(worker) == expected
        await worker.post(path(worker, "/heartbeat"), {})
        assert await tools(worker) == expected
    body = {"name": "bare", "fingerprint": "f"}
    assert (await fleet.admin.post("/workers/register", body)).json()["tools"] == []
    assert (await fleet.admin.post("/workers/register", {**body, "tools": None})).json()["tools"] is None


async def test_silence_takes_offline_and_any_call_brings_back(fleet: Any) -> None:
    worker = await fleet.worker()
    await go_offline(fleet)
    await fleet.kit.kernel.container.get(WorkerSweeps).sweep_silent_workers()
    assert await status(fleet, worker) == "offline"
    assert (await worker.get(path(worker))).status == 200
    await liveness(fleet).write_contacts()
    assert await status(fleet, worker) == "online"
    assert len(await fleet.told("worker.offline")) == 1
    assert len(await fleet.told("worker.online")) == 2

    await go_offline(fleet)
    assert (await worker.post(path(worker, "/heartbeat"))).json()["status"] == "online"
    await go_offline(fleet)
    await worker.post(path(worker, "/claim"))
    assert await status(fleet, worker) == "online"


@pytest.mark.one_engine
async def test_signs_of_life_are_written_rarely(fleet: Any) -> None:
    worker = await fleet.worker()
    clock.travel(20)
    await worker.get(path(worker))
    await liveness(fleet).write_contacts()
    seen = await fleet.work(lambda: Worker.get_by_id(worker.user["id"]).last_seen_at)
    clock.travel(2)
    for _ in range(3):
        await worker.post(path(worker, "/claim"))
        await liveness(fleet).write_contacts()
    assert await fleet.work(lambda: Worker.get_by_id(worker.user["id"]).last_seen_at) == seen


@pytest.mark.one_engine
async def test_a_claim_that_hangs_is_no_sign_of_life(fleet: Any) -> None:
    worker = await fleet.worker()
    hanging = asyncio.create_task(worker.post(path(worker, "/claim"), {"wait_seconds": 20}))
    await asyncio.sleep(0.3)
    await liveness(fleet).write_contacts()
    seen = await fleet.work(lambda: Worker.get_by_id(worker.user["id"]).last_seen_at)
    fleet.kit.kernel.credentials.forget(lambda caller: True)
    clock.travel(10)
    await asyncio.sleep(1.5)
    await liveness(fleet).write_contacts()
    assert not hanging.done()
    assert await fleet.work(lambda: Worker.get_by_id(worker.user["id"]).last_seen_at) == seen
    hanging.cancel()


@pytest.mark.one_engine
async def test_a_claim_that_hangs_ends_with_its_token(fleet: Any) -> None:
    by = await fleet.key(auto_approve=True)
    worker = await fleet.worker(by=by)
    hanging = asyncio.create_task(worker.post(path(worker, "/claim"), {"wait_seconds": 20}))
    await asyncio.sleep(0.3)
    again = await by.post("/workers/register", {"name": "w1"})
    assert (again.status, again.json()["id"]) == (200, worker.user["id"])
    await fleet.work(fleet.tasks.add)
    async with within(2):
        answer = await hanging
    assert (answer.status, answer.code) == (401, "unauthenticated")
    assert len(fleet.tasks.waiting) == 1


@pytest.mark.one_engine
async def test_heartbeats_are_asked_for_often_enough_for_the_lease(
    make_fleet: Callable[..., Awaitable[Any]],
) -> None:
    fleet = await make_fleet(config={"settings.workers.heartbeat_seconds": 300})
    worker = await fleet.worker()
    assert worker.user["heartbeat_seconds"] == 20
    assert (await worker.post(path(worker, "/heartbeat"))).json()["next_heartbeat_seconds"] == 20


async def test_a_signal_arrives_at_once_even_of_a_task_claimed_meanwhile(fleet: Any) -> None:
    worker = await fleet.worker()
    listening = asyncio.create_task(worker.get(path(worker, "/signals?wait=20")))
    await asyncio.sleep(0.3)
    await fleet.work(fleet.tasks.add)
    claimed = (await worker.post(path(worker, "/claim"))).json()["tasks"][0]
    assert (await worker.post(path(worker, "/heartbeat"))).json()["next_heartbeat_seconds"] == 15
    await asyncio.sleep(0.7)
    assert not listening.done()
    await fleet.work(lambda: fleet.tasks.signal(claimed["lease_id"], "cancel_requested"))
    async with within(1):
        answer = (await listening).json()
    assert [(each["seq"], each["state"]) for each in answer["signals"]] == [(1, "cancel_requested")]
    assert (await worker.get(path(worker, "/signals?after=1"))).json()["signals"] == []


async def test_commands_come_with_signals_and_heartbeats(fleet: Any) -> None:
    worker = await fleet.worker()
    clock.travel(1)
    listening = asyncio.create_task(worker.get(path(worker, "/signals?wait=20")))
    await asyncio.sleep(0.2)
    assert (await fleet.admin.post(f"/admin{path(worker, '/drain')}")).json()["status"] == "draining"
    async with within(1.5):
        assert (await listening).json() == {"signals": [], "commands": ["drain"]}
    beat = (await worker.post(path(worker, "/heartbeat"))).json()
    assert (beat["status"], beat["commands"]) == ("draining", ["drain"])
    await fleet.admin.post(f"/admin{path(worker, '/resume')}")
    assert (await worker.post(path(worker, "/heartbeat"))).json()["commands"] == ["resume"]
    await fleet.admin.patch(f"/admin{path(worker)}", {"max_agents": 7})
    assert (await worker.post(path(worker, "/heartbeat"))).json()["commands"] == ["resume", "config_changed"]
    clock.travel(40)
    assert (await worker.post(path(worker, "/heartbeat"))).json()["commands"] == []


@pytest.mark.one_engine
async def test_a_claim_says_why_it_is_empty(fleet: Any) -> None:
    worker = await fleet.worker(max_agents=1)
    assert (await worker.post(path(worker, "/claim"))).json() == {"tasks": [], "reason": "none"}
    for _ in range(2):
        await fleet.work(fleet.tasks.add)
    assert (await worker.post(path(worker, "/claim"), {"max_tasks": 5})).json()["reason"] == "ok"
    assert (await worker.post(path(worker, "/claim"))).json() == {"tasks": [], "reason": "at_capacity"}
    await fleet.admin.post(f"/admin{path(worker, '/drain')}")
    assert (await worker.post(path(worker, "/claim"))).json() == {"tasks": [], "reason": "draining"}


@pytest.mark.one_engine
async def test_an_empty_claim_waits_for_its_time(fleet: Any) -> None:
    worker = await fleet.worker()
    began = asyncio.get_running_loop().time()
    answer = await worker.post(path(worker, "/claim"), {"wait_seconds": 1}, headers={"Idempotency-Key": "c1"})
    assert answer.json() == {"tasks": [], "reason": "none"}
    assert 0.9 <= asyncio.get_running_loop().time() - began < 3


@pytest.mark.one_engine
async def test_without_tasks_a_claim_is_503(make_fleet: Callable[..., Awaitable[Any]]) -> None:
    fleet = await make_fleet(tasks=False)
    worker = await fleet.worker()
    answer = await worker.post(path(worker, "/claim"))
    assert (answer.status, answer.code) == (503, "plugin_disabled")
    assert (await worker.get(path(worker, "/tasks"))).json()["items"] == []
    assert (await worker.get(path(worker, "/signals"))).json() == {"signals": [], "commands": []}
    assert (await worker.post(path(worker, "/heartbeat"))).json()["pending_tasks"] == 0
    assert (await worker.post(path(worker, "/deregister"))).status == 200


@pytest.mark.one_engine
async def test_leaving(fleet: Any) -> None:
    worker = await fleet.worker(max_agents=2)
    await fleet.work(fleet.tasks.add)
    await worker.post(path(worker, "/claim"))
    member = await fleet.kit.as_user("member")
    assert (await member.post(path(worker, "/deregister"))).status == 403
    assert (await worker.post(path(worker, "/deregister"), {})).status == 200
    assert fleet.tasks.leases == {}
    assert (await worker.get(path(worker))).status == 401
    assert (await fleet.admin.get(path(worker))).status == 404
    assert len(await fleet.told("worker.deleted")) == 1
