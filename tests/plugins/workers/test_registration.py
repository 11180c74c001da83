"""Registration, first and repeated, by people and with keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral import clock
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service.registration import RegistrationKeys

pytestmark = pytest.mark.one_engine

FULL = {
    "name": "rack-1",
    "hostname": "rack-1.example",
    "ip_address": "::ffff:10.0.0.9",
    "max_agents": 4,
    "cpu_cores": 8,
    "memory_total_mb": 16_000,
    "os_info": {"name": "Linux"},
    "labels": {"gpu/kind": "a100"},
    "agent_version": "1.0",
    "tools": ["shell.run", {"name": "my.tool", "schema": {"type": "object"}, "risk": "read"}],
    "fingerprint": "f1",
}


async def test_a_member_registers_a_worker_that_waits_for_approval(fleet: Any) -> None:
    member = await fleet.kit.as_user("member")
    answer = await member.post("/workers/register", FULL)
    assert answer.status == 201
    worker = answer.json()
    assert answer.headers["location"] == f"/api/v1/workers/{worker['id']}"
    assert answer.headers["cache-control"] == "no-store"
    assert worker["token"].startswith("crw_")
    assert (worker["heartbeat_seconds"], worker["lease_seconds"], worker["ack_seconds"]) == (15, 60, 30)
    assert (worker["status"], worker["is_approved"], worker["ip_address"]) == ("pending", False, "10.0.0.9")
    assert worker["created_by"] == member.user["id"]
    assert worker["tools"] == FULL["tools"]
    assert worker["capacity"] == 4
    assert "fingerprint" not in answer.body.decode()
    assert [event["name"] for event in await fleet.told("worker.registered")] == ["rack-1"]

    stored = await fleet.work(lambda: Worker.get_by_id(worker["id"]))
    assert worker["token"] not in repr(stored.__data__)
    assert "f1" not in (stored.fingerprint_hash, stored.token_hash)


async def test_the_clients_address_is_taken_when_none_is_given(fleet: Any) -> None:
    worker = await fleet.worker("w1")
    assert worker.user["ip_address"] == "127.0.0.1"


async def test_who_may_register(fleet: Any) -> None:
    viewer = await fleet.kit.as_user("viewer")
    assert (await viewer.post("/workers/register", {"name": "w1"})).code == "forbidden"
    worker = await fleet.worker("w1")
    assert (await worker.post("/workers/register", {"name": "w2"})).code == "forbidden"


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"ip_address": "nonsense"}, "/ip_address"),
        ({"os_info": "x" * 5000}, "/os_info"),
        ({"labels": {"Not Ok": "x"}}, "/labels"),
        ({"max_agents": 0}, "/max_agents"),
        ({"max_agents": 1001}, "/max_agents"),
        ({"status": "online"}, "/status"),
        ({"is_approved": True}, "/is_approved"),
        ({"group": "gpu"}, "/group"),
        ({"tools": ["a b"]}, "/tools/0"),
        ({"name": "embedded"}, "/name"),
    ],
)
async def test_what_is_refused(fleet: Any, fields: dict[str, Any], pointer: str) -> None:
    answer = await fleet.admin.post("/workers/register", {"name": "w1", **fields})
    assert answer.status == 422
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)


async def test_again_gives_the_same_id_and_a_fresh_token(fleet: Any) -> None:
    member = await fleet.kit.as_user("member")
    worker = await fleet.worker("rack-1", by=member, fingerprint="f1", max_agents=3)
    again = await member.post("/workers/register", {"name": "rack-1", "fingerprint": "f1", "hostname": "moved"})
    assert again.status == 200
    assert again.json()["id"] == worker.user["id"]
    assert again.json()["is_approved"] is True
    assert (again.json()["hostname"], again.json()["max_agents"]) == ("moved", 3)
    assert (await worker.get(f"/workers/{worker.user['id']}")).status == 401
    fresh = fleet.client(again.json()["token"])
    assert (await fresh.get(f"/workers/{worker.user['id']}")).status == 200


async def test_without_a_fingerprint_the_host_name_decides(fleet: Any) -> None:
    await fleet.worker("w1", hostname="a")
    assert (await fleet.admin.post("/workers/register", {"name": "w1", "hostname": "a"})).status == 200
    assert (await fleet.admin.post("/workers/register", {"name": "w1", "hostname": "b"})).code == "duplicate"
    fingerprint = {"name": "w1", "hostname": "a", "fingerprint": "late"}
    assert (await fleet.admin.post("/workers/register", fingerprint)).code == "duplicate"


async def test_a_taken_name_is_a_conflict(fleet: Any) -> None:
    member = await fleet.kit.as_user("member")
    worker = await fleet.worker("w1", fingerprint="f")
    for client, fields in ((member, {"fingerprint": "f"}), (fleet.admin, {"fingerprint": "g"}), (fleet.admin, {})):
        answer = await client.post("/workers/register", {"name": "w1", **fields})
        assert (answer.status, answer.code) == (409, "duplicate")
        assert answer.json()["existing_id"] == worker.user["id"]
    assert (await worker.get(f"/workers/{worker.user['id']}")).status == 200


async def test_again_releases_the_leases_of_the_former_life(fleet: Any) -> None:
    worker = await fleet.worker("w1", fingerprint="f", max_agents=2)
    await fleet.work(fleet.tasks.add)
    assert len((await worker.post(f"/workers/{worker.user['id']}/claim")).json()["tasks"]) == 1
    again = await fleet.admin.post("/workers/register", {"name": "w1", "fingerprint": "f"})
    assert again.json()["active_leases"] == 0
    assert fleet.tasks.leases == {}
    assert len(fleet.tasks.waiting) == 1


async def test_again_raises_no_rights(fleet: Any) -> None:
    worker = await fleet.worker("w1", fingerprint="f")
    assert (await fleet.approve(worker.user["id"], is_approved=False)).status == 200
    again = (await fleet.admin.post("/workers/register", {"name": "w1", "fingerprint": "f"})).json()
    assert (again["status"], again["is_approved"]) == ("rejected", False)
    client = fleet.client(again["token"])
    beat = await client.post(f"/workers/{again['id']}/heartbeat")
    assert (beat.code, beat.json()["current_status"]) == ("invalid_state", "rejected")
    assert (await client.post(f"/workers/{again['id']}/claim")).code == "worker_not_approved"


async def test_a_key_registers_into_its_group_and_approves(fleet: Any) -> None:
    key = await fleet.key(group="gpu", auto_approve=True)
    answer = await key.post("/workers/register", {"name": "w1"})
    worker = answer.json()
    assert (answer.status, worker["status"], worker["group"]) == (201, "online", "gpu")
    assert worker["created_by"] == fleet.admin.user["id"]
    assert [len(await fleet.told(f"worker.{what}")) for what in ("registered", "approved", "online")] == [1, 1, 1]
    assert (await key.get("/workers/overview")).code == "forbidden"
    assert (await key.post(f"/workers/{worker['id']}/heartbeat")).code == "forbidden"
    assert (await fleet.admin.post("/workers/register", {"name": "w1"})).code == "duplicate"


async def test_a_key_is_good_for_its_uses_and_its_time(fleet: Any) -> None:
    key = await fleet.key(max_uses=2)
    answers = await asyncio.gather(*[key.post("/workers/register", {"name": f"w{n}"}) for n in range(6)])
    assert sorted(answer.status for answer in answers) == [201, 201, 403, 403, 403, 403]
    known = next(answer.json()["name"] for answer in answers if answer.status == 201)
    assert (await key.post("/workers/register", {"name": known})).status == 200  # no use is taken
    clock.travel(8 * 86_400)
    answer = await key.post("/workers/register", {"name": known})
    assert (answer.status, answer.code) in ((401, "unauthenticated"), (401, "token_expired"))


async def test_keys_are_listed_without_their_secret_and_deleted_at_once(fleet: Any) -> None:
    key = await fleet.key()
    listed = (await fleet.admin.get("/admin/registration-keys")).json()
    assert listed["total"] == 1
    assert "key" not in listed["items"][0]
    assert (await key.post("/workers/register", {"name": "w1"})).status == 201
    path = f"/admin/registration-keys/{listed['items'][0]['id']}"
    assert [(await fleet.admin.delete(path)).status for _ in range(2)] == [204, 404]
    assert (await key.post("/workers/register", {"name": "w2"})).status == 401


@pytest.mark.parametrize(
    ("expires_at", "code"), [("2020-01-01T00:00:00Z", "in_the_past"), ("2990-01-01T00:00:00Z", "too_large")]
)
async def test_the_end_of_a_key_is_bounded(fleet: Any, expires_at: str, code: str) -> None:
    answer = await fleet.admin.post("/admin/registration-keys", {"name": "k", "expires_at": expires_at})
    assert [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]] == [("/expires_at", code)]


async def test_settings_bound_the_fleet_and_may_approve(make_fleet: Callable[..., Awaitable[Any]]) -> None:
    config = {"settings.workers.max_workers": 1, "settings.workers.auto_approve": True}
    fleet = await make_fleet(config=config)
    assert (await fleet.worker("w1", approve=False)).user["status"] == "online"
    answer = await fleet.admin.post("/workers/register", {"name": "w2"})
    assert (answer.status, answer.code) == (429, "quota_exceeded")


async def test_the_servers_own_worker_takes_its_row_over(fleet: Any) -> None:
    keys = fleet.kit.kernel.container.get(RegistrationKeys)
    first, second = [fleet.client(await fleet.work(keys.create_embedded)) for _ in range(2)]
    made = await first.post("/workers/register", {"name": "embedded", "fingerprint": "one", "max_agents": 2})
    assert (made.status, made.json()["status"], made.json()["embedded"]) == (201, "online", True)
    again = await second.post("/workers/register", {"name": "embedded", "fingerprint": "two"})
    assert (again.status, again.json()["id"]) == (200, made.json()["id"])
    assert (await fleet.client(made.json()["token"]).get("/workers/overview")).status == 401
    assert (await fleet.client(again.json()["token"]).get(f"/workers/{made.json()['id']}")).status == 200
    assert (await second.post("/workers/register", {"name": "other"})).status == 422
    assert (await fleet.admin.get("/admin/registration-keys")).json()["total"] == 0


async def test_the_same_call_with_the_same_key_makes_one_worker(fleet: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    answers = [await fleet.admin.post("/workers/register", {"name": "w1"}, headers=headers) for _ in range(2)]
    assert answers[0].body == answers[1].body
    assert answers[1].headers["idempotency-replayed"] == "true"
