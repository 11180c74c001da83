"""What the dead letter queue promises, by the numbers of the page. 4 with a killed server is in `test_batches.py`."""

from __future__ import annotations

import asyncio

import pytest
from tests.plugins.dead_letter.conftest import Morgue

from corral_plugins.dead_letter.api import REASONS


async def test_dead_letter_1_a_task_that_fails_three_times_has_one_open_letter(morgue: Morgue) -> None:
    task_id = await morgue.task("doomed", retry_policy={"max_attempts": 3, "initial_seconds": 1, "jitter": 0})
    for n in range(3):
        lease = await morgue.worker.run()
        await lease.ok("fail", {"error": {"type": "Boom", "message": f"Attempt {n + 1}."}})
        await morgue.pass_time(10)
    task = await morgue.read(task_id)
    letter = await morgue.letter(task_id)
    assert (task["status"], task["dead_letter_id"]) == ("failed", letter["id"])
    assert (letter["reason"], letter["error_type"], letter["error_message"]) == ("max_attempts", "Boom", "Attempt 3.")
    assert [each["n"] for each in letter["attempts"]] == [1, 2, 3]
    assert letter["attempts"][0]["error"]["message"] == "Attempt 1."
    assert letter["first_failed_at"] == letter["attempts"][0]["finished_at"]
    assert (letter["task_snapshot"]["title"], letter["retry_count"]) == ("doomed", 0)
    assert (await morgue.kinds(task_id))[-2:] == ["task.failed", "task.dead_lettered"]


async def test_dead_letter_2_of_20_parallel_retries_one_wins_and_the_task_runs_once(morgue: Morgue) -> None:
    task_id = await morgue.dead()
    letter = await morgue.letter(task_id)
    answers = await asyncio.gather(*(morgue.admin.post(f"/dead-letter/{letter['id']}/retry", {}) for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 19
    assert {answer.code for answer in answers if answer.status == 409} == {"already_retried"}
    (won,) = [answer.json() for answer in answers if answer.status == 200]
    assert (won["status"], won["task"]["status"], won["task"]["attempt"]) == ("retried", "pending", 0)
    lease = await morgue.worker.run()
    assert await morgue.worker.claim_all() == []
    await lease.ok("complete", {"result": {}})
    assert (await morgue.read(task_id))["status"] == "completed"
    (shown,) = await morgue.letters("?status=all")
    assert shown["status"] == "retried"


async def test_dead_letter_3_three_lost_workers_in_a_row_are_a_crash_loop(morgue: Morgue) -> None:
    """The short form: nobody renews the lease. R2 (`tests/promises`) kills real workers."""
    task_id = await morgue.task(retry_policy={"max_attempts": 10})
    for _ in range(3):
        await morgue.worker.run()
        await morgue.later(61)
        assert (await morgue.worker.client.post(f"/workers/{morgue.worker.id}/heartbeat", {})).status == 200
    assert (await morgue.letter(task_id))["reason"] == "crash_loop"


async def test_dead_letter_5_a_task_is_given_up_by_hand_unless_a_worker_holds_it(morgue: Morgue) -> None:
    task_id = await morgue.task()
    lease = await morgue.worker.run()
    body = {"task_id": task_id, "reason": "Nobody needs it."}
    assert (await morgue.admin.post("/dead-letter", body)).code == "invalid_state"
    await lease.ok("release")
    added = await morgue.admin.post("/dead-letter", body)
    assert (added.status, added.json()["reason"], added.json()["note"]) == (201, "manual", "Nobody needs it.")
    task = await morgue.read(task_id)
    assert (task["status"], task["error"]["type"]) == ("failed", "manual")
    again = await morgue.admin.post("/dead-letter", body)
    assert (again.code, again.json()["existing_id"]) == ("duplicate", added.json()["id"])
    done = await morgue.task()
    await (await morgue.worker.run()).ok("complete", {"result": {}})
    assert (await morgue.admin.post("/dead-letter", {"task_id": done})).code == "task_terminal"
    assert await morgue.worker.claim_all() == []


async def test_dead_letter_6_a_discarded_letter_is_gone_for_good(morgue: Morgue) -> None:
    task_id = await morgue.dead()
    letter = await morgue.letter(task_id)
    path = f"/dead-letter/{letter['id']}"
    assert (await morgue.admin.delete(path)).status == 204
    assert (await morgue.admin.delete(path)).status == 404
    assert (await morgue.admin.post(f"{path}/retry", {})).code == "invalid_state"
    assert (await morgue.read(task_id))["status"] == "failed"
    assert [each["id"] for each in await morgue.letters("?status=discarded")] == [letter["id"]]
    assert (await morgue.member.post(f"/tasks/{task_id}/retry", {})).status == 200  # the owner still can


@pytest.mark.one_engine
async def test_dead_letter_6_members_are_refused_on_every_verb(morgue: Morgue) -> None:
    letter = await morgue.letter(await morgue.dead())
    path = f"/dead-letter/{letter['id']}"
    for method, each in (
        ("GET", "/dead-letter"),
        ("POST", "/dead-letter"),
        ("GET", path),
        ("DELETE", path),
        ("POST", f"{path}/retry"),
        ("POST", "/dead-letter/retry-all"),
        ("POST", "/dead-letter/discard-all"),
        ("GET", "/dead-letter/stats"),
        ("GET", f"/dead-letter/batches/{letter['id']}"),
        ("POST", f"/dead-letter/batches/{letter['id']}/cancel"),
    ):
        answer = await morgue.member.request(method, each, {} if method == "POST" else None)
        assert (answer.status, answer.code) == (403, "forbidden"), (method, each, answer)


async def test_dead_letter_8_the_statistics_of_an_empty_system_are_zeros_and_nulls(morgue: Morgue) -> None:
    answer = await morgue.admin.get("/dead-letter/stats")
    assert answer.json() == {
        "total": 0,
        "by_reason": dict.fromkeys(REASONS, 0),
        "by_error_type": {},
        "by_agent": {},
        "oldest_age_ms": None,
        "added_1h": 0,
        "added_24h": 0,
        "retried_24h": 0,
        "retry_success_rate": None,
    }
