"""What tasks, agents and claims must withstand: ends that meet, secrets in stored answers, instants at the edge."""

from __future__ import annotations

from typing import Any

import pytest

from corral.http.idempotency import IdempotencyRow
from corral.testing.kit import Client


async def test_the_token_in_a_stored_claim_is_sealed(world: Any) -> None:
    await world.task()
    keyed = {"headers": {"Idempotency-Key": "claim"}}
    answer = await world.worker.client.post(f"/workers/{world.worker.id}/claim", {}, **keyed)
    token = answer.json()["tasks"][0]["agent_token"]

    def stored() -> list[str]:
        return [row.body or "" for row in IdempotencyRow.select()]

    bodies = await world.kit.kernel.database.work(stored, read=True)
    assert bodies
    assert not any(token in body for body in bodies)
    again = await world.worker.client.post(f"/workers/{world.worker.id}/claim", {}, **keyed)
    assert again.body == answer.body


@pytest.mark.one_engine
async def test_deleting_a_task_leaves_no_dependent_behind_that_a_job_had_yet_to_tell(world: Any) -> None:
    for ending, expected in (({"result": None}, "pending"), (None, "failed")):
        needed = await world.task()
        dependents = [await world.task(f"dependent {n}", depends_on=[needed]) for n in range(202)]
        if ending is not None:
            answer = await world.member.post(f"/tasks/{needed}/complete", ending)
        else:
            answer = await world.member.post(f"/tasks/{needed}/fail", {"error": {"type": "x", "message": ""}})
        assert answer.status == 200, answer
        assert (await world.member.delete(f"/tasks/{needed}")).status == 204
        await world.kit.run_jobs()
        assert {(await world.read(task_id))["status"] for task_id in dependents[-5:] + dependents[:5]} == {expected}


async def test_a_dependent_stays_failed_while_another_task_that_it_needs_has_failed(world: Any) -> None:
    first, second = await world.task("first"), await world.task("second")
    dependent = await world.task("dependent", depends_on=[first, second])
    for task_id in (first, second):
        answer = await world.member.post(f"/tasks/{task_id}/fail", {"error": {"type": "x", "message": ""}})
        assert answer.status == 200, answer
    assert (await world.member.post(f"/tasks/{first}/retry", {})).status == 200
    assert (await world.member.post(f"/tasks/{first}/complete", {"result": None})).status == 200
    seen = await world.read(dependent)
    assert seen["status"] == "failed"
    assert second in seen["error"]["message"]
    assert (await world.member.post(f"/tasks/{second}/retry", {})).status == 200
    assert (await world.read(dependent))["status"] == "blocked"
    assert (await world.member.post(f"/tasks/{second}/complete", {"result": None})).status == 200
    assert (await world.read(dependent))["status"] == "pending"


@pytest.mark.parametrize(
    "fields",
    [
        {"deadline": "9999-12-31T23:59:59-14:00"},
        {"available_at": "0001-01-01T00:00:00+14:00"},
        {"available_at": "9999-12-31T23:59:59Z", "queue_timeout_seconds": 2_592_000},
    ],
)
async def test_instants_at_the_edge_of_the_calendar(world: Any, fields: dict[str, Any]) -> None:
    task_id = await world.task(**fields)
    assert (await world.read(task_id))["status"] == "pending"
    moment = "9999-12-31T23:59:59-14:00".replace(":", "%3A")
    assert (await world.member.get(f"/tasks?since={moment}")).status == 200


@pytest.mark.one_engine
@pytest.mark.parametrize("how", ["cancel", "stop"])
async def test_children_end_with_their_parent_whenever_they_were_made(world: Any, how: str) -> None:
    task_id = await world.task()
    lease = await world.worker.run()
    run = Client(world.kit.application.app, lease.claim["agent_token"])
    if how == "cancel":
        assert (await world.member.post(f"/tasks/{task_id}/cancel", {})).status == 202
    child = await world.task("child", by=run, available_at="2090-01-01T00:00:00Z")
    if how == "cancel":
        await lease.ok("cancelled")
    else:
        stop = {"mode": "immediate", "cancel_tasks": True}
        assert (await world.member.post(f"/agents/{world.agent_id}/stop", stop)).status == 200
    assert (await world.read(task_id))["status"] == "cancelled"
    assert (await world.read(child))["status"] == "cancelled"


@pytest.mark.one_engine
async def test_an_owner_cannot_complete_a_task_with_a_result_that_breaks_its_schema(world: Any) -> None:
    schema = {"type": "object", "required": ["n"]}
    leased, queued = [await world.task(output_schema=schema) for _ in range(2)]
    lease = await world.worker.run()
    assert lease.task_id == leased
    for task_id, status in ((leased, "running"), (queued, "pending")):
        answer = await world.member.post(f"/tasks/{task_id}/complete", {"result": {"m": 1}})
        assert (answer.status, answer.code) == (422, "schema_mismatch"), answer
        assert answer.json()["errors"][0]["pointer"].startswith("/result")
        assert (await world.read(task_id))["status"] == status
        answer = await world.member.post(f"/tasks/{task_id}/complete", {"result": {"n": 1}})
        assert (answer.status, answer.json()["status"]) == (200, "completed"), answer
    assert (await lease.call("progress")).code == "lease_lost"


@pytest.mark.one_engine
async def test_what_needs_a_deleted_task_that_did_not_complete_is_not_tried_again(world: Any) -> None:
    needed = await world.task("needed")
    cancelled, failed = [await world.task(title, depends_on=[needed]) for title in ("cancelled", "failed")]
    await world.member.post(f"/tasks/{cancelled}/cancel", {})
    await world.member.post(f"/tasks/{needed}/fail", {"error": {"type": "x", "message": ""}})
    for _ in range(2):
        for task_id in (cancelled, failed):
            answer = await world.member.post(f"/tasks/{task_id}/retry")
            assert (answer.status, answer.code) == (409, "invalid_state"), answer
        await world.member.delete(f"/tasks/{needed}")


@pytest.mark.one_engine
async def test_what_needs_a_deleted_task_that_completed_is_tried_again(world: Any) -> None:
    needed = await world.task("needed")
    dependent = await world.task("dependent", depends_on=[needed])
    await world.member.post(f"/tasks/{dependent}/cancel", {})
    await world.member.post(f"/tasks/{needed}/complete", {"result": None})
    assert (await world.member.delete(f"/tasks/{needed}")).status == 204
    assert (await world.member.post(f"/tasks/{dependent}/retry")).json()["status"] == "pending"
