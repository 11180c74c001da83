"""Secrets for workers: names with the claim, values under the lease, for listed groups only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tasks.conftest import Lease, World

from corral.testing.kit import Client

VALUE = "wk-1234-value-for-the-build-farm"


@pytest.fixture
async def world(make_kit: Callable[..., Any]) -> World:
    kit = await make_kit(plugins=("admin", "agents", "audit", "secrets", "workers", "tasks"))
    world = await World().build(kit)
    await world.admin.patch(f"/admin/workers/{world.worker.id}", {"group": "farm"})
    return world


async def secret(world: World, name: str = "Deploy", group: str = "farm", **more: Any) -> str:
    """A secret for a group; its id."""
    fields = {"allowed_consumers": [f"worker_group:{group}"], "allowed_hosts": ["registry.example.org"], **more}
    answer = await world.admin.post("/secrets", {"name": name, "value": VALUE, **fields})
    assert answer.status == 201, answer
    found: str = answer.json()["id"]
    return found


async def run(world: World) -> Lease:
    await world.task(agent_id=world.agent_id)
    return await world.worker.run()


@pytest.mark.one_engine
async def test_a_worker_gets_a_value_under_its_lease_and_it_is_written_down(world: World) -> None:
    id = await secret(world)
    lease = await run(world)
    answer = await lease.call("secrets/deploy", {"purpose": "push the image"})
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    assert answer.json() == {"value": VALUE, "allowed_hosts": ["registry.example.org"]}
    (row,) = (await world.admin.get("/admin/audit?action=secrets.secret.deliver")).json()["items"]
    assert (row["object"]["id"], row["actor"]["type"]) == (id, "worker")
    assert "push the image" in str(row)
    assert VALUE not in str(row)


@pytest.mark.one_engine
async def test_the_claim_lists_the_names_that_the_group_may_have(world: World) -> None:
    await secret(world)
    await secret(world, "Other", "elsewhere")

    async def listed() -> list[str]:
        await world.task(agent_id=world.agent_id)
        lease = await world.worker.claim()
        found: list[str] = lease.claim["secrets"]
        return found

    for _ in range(50):  # 2 s after the change at most, in every process
        if await listed() == ["Deploy"]:
            return
    raise AssertionError("the claim does not list the secret")


@pytest.mark.one_engine
async def test_others_get_nothing(world: World) -> None:
    id = await secret(world)
    await secret(world, "Other", "elsewhere")
    lease = await run(world)
    for name in ("other", "absent"):
        assert (await lease.call(f"secrets/{name}")).status == 404
    agent = Client(world.kit.application.app, lease.claim["agent_token"])
    path = f"/tasks/{lease.task_id}/secrets/deploy"
    assert (await agent.post(path, {})).status == 403
    assert (await world.admin.post(path, {"lease_id": lease.lease_id})).status == 403
    second = await world.machine("second", max_agents=1)
    assert (await second.client.post(path, {"lease_id": lease.lease_id})).status == 403
    await lease.ok("complete", {"result": {}})
    lost = await lease.call("secrets/deploy")
    assert (lost.status, lost.code) == (409, "lease_lost")
    seen = [(await world.admin.get(f"/secrets/{id}")).body, str(await world.kit.events()).encode()]
    assert not any(VALUE.encode() in text for text in seen)


@pytest.mark.one_engine
async def test_a_keyed_delivery_is_per_use_too(world: World) -> None:
    await secret(world)
    lease = await run(world)
    path, keyed = f"/tasks/{lease.task_id}/secrets/deploy", {"Idempotency-Key": "deploy"}
    body = {"lease_id": lease.lease_id}
    for _ in range(2):
        answer = await world.worker.client.post(path, body, headers=keyed)
        assert (answer.status, answer.json()["value"]) == (200, VALUE)
    await lease.ok("complete", {"result": {}})
    lost = await world.worker.client.post(path, body, headers=keyed)
    assert (lost.status, lost.code) == (409, "lease_lost")
    audited = (await world.admin.get("/admin/audit?action=secrets.secret.deliver")).json()
    assert audited["total"] == 2


@pytest.mark.one_engine
async def test_a_worker_without_a_listed_group_and_an_expired_secret(world: World) -> None:
    from corral import clock

    await secret(world, expires_at=clock.now(3))
    lease = await run(world)
    clock.travel(4)
    assert (await lease.call("secrets/deploy")).code == "secret_expired"
    await world.admin.patch(f"/admin/workers/{world.worker.id}", {"group": "other"})
    assert (await lease.call("secrets/deploy")).status == 404


@pytest.mark.one_engine
async def test_a_value_that_a_worker_reports_is_taken_out_and_told_of(world: World) -> None:
    await secret(world)
    lease = await run(world)
    assert (await lease.call("secrets/deploy")).status == 200
    redactor = world.kit.kernel.redactor
    for _ in range(500):
        if VALUE not in redactor.redact(VALUE, patterns=False):
            break
        await lease.ok("progress", {"percent": 1})
    await lease.ok("complete", {"result": {"log": f"used {VALUE}"}})
    assert (await world.read(lease.task_id))["result"] == {"log": "used [redacted]"}
    for _ in range(500):
        told = [event for event in await world.kit.events() if event.type == "system.alert"]
        if found := [event for event in told if "secret_detected" in event.data]:
            break
    assert found[0].object_id == lease.task_id
    assert "Deploy" in found[0].data
    assert VALUE not in found[0].data
