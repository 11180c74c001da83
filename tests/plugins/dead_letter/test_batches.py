"""Batches of retries: their rate, that one runs at a time, and what stops them. The kit's clock makes the time pass."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import peewee
import pytest
from tests.plugins.dead_letter.conftest import Morgue

from corral import clock
from corral.errors import Conflict
from corral.testing.server import ServerProcess
from corral_plugins.dead_letter.service.batches import DeadLetterBatches
from corral_plugins.dead_letter.service.letters import DeadLetterQueue, find_letter

SLACK_SECONDS = 15.0


async def fill(morgue: Morgue, count: int) -> list[str]:
    """Tasks that their owner failed, oldest first."""
    tasks = []
    for n in range(count):
        tasks.append(await morgue.task(f"dead {n}"))
        await morgue.dead_by_owner(tasks[-1])
    return tasks


async def start(morgue: Morgue, **body: Any) -> str:
    """Start a batch; its path."""
    answer = await morgue.admin.post("/dead-letter/retry-all", body)
    assert answer.status == 202, answer
    location: str = answer.headers["location"].removeprefix("/api/v1")
    return location


async def read(morgue: Morgue, batch: str) -> Any:
    """The batch now."""
    return (await morgue.admin.get(batch)).json()


class Frozen:
    """A clock that stands still, so that the time which the machine takes for a step does not count."""

    def __init__(self) -> None:
        self.seconds = clock.time_s()

    async def pass_seconds(self, morgue: Morgue, seconds: float) -> None:
        """Let time pass in steps of a quarter of a second, as the job runner looks at its table."""
        for _ in range(round(seconds * 4)):
            self.seconds += 0.25
            await morgue.kit.run_jobs()


@pytest.fixture
def frozen(morgue: Morgue, monkeypatch: pytest.MonkeyPatch) -> Frozen:
    """The clock, which stands still from now on."""
    made = Frozen()
    monkeypatch.setattr(clock, "time_s", lambda: made.seconds)
    return made


async def test_dead_letter_4_100_letters_at_5_a_second_take_20_seconds(morgue: Morgue, frozen: Frozen) -> None:
    tasks = await fill(morgue, 100)
    batch = await start(morgue, rate_per_second=5)
    second = await morgue.admin.post("/dead-letter/retry-all", {})
    assert (second.code, second.json()["existing_id"]) == ("batch_in_progress", batch.rpartition("/")[2])
    began, done = clock.time_s(), 0
    await morgue.kit.run_jobs()
    while (found := await read(morgue, batch))["status"] == "running":
        assert found["requeued"] - done <= 2
        assert found["requeued"] <= 5 * (clock.time_s() - began) + 1
        done = found["requeued"]
        await frozen.pass_seconds(morgue, 0.25)
    took = clock.time_s() - began
    assert 18 <= took <= 22, took
    assert (found["status"], found["matched"], found["requeued"], found["skipped"]) == ("done", 100, 100, [])
    assert await morgue.letters() == []
    order = [event.object_id for event in await morgue.kit.events() if event.type == "task.retried"]
    assert order == tasks
    assert (await morgue.admin.post("/dead-letter/retry-all", {})).status == 202


async def test_a_delayed_batch_makes_up_for_it_in_small_units(morgue: Morgue, frozen: Frozen) -> None:
    await fill(morgue, 30)
    batch = await start(morgue, rate_per_second=50)
    frozen.seconds += 60
    await morgue.kit.run_jobs()
    assert (await read(morgue, batch))["requeued"] == 10
    await frozen.pass_seconds(morgue, 1)
    found = await read(morgue, batch)
    assert (found["status"], found["requeued"]) == ("done", 30)


@pytest.mark.one_engine
async def test_a_batch_takes_what_was_open_when_it_started(morgue: Morgue, frozen: Frozen) -> None:
    tasks = await fill(morgue, 4)
    first, second, third, _ = reversed(await morgue.letters())
    batch = await start(morgue, rate_per_second=1, max=3)
    frozen.seconds += 0.01
    assert (await morgue.admin.post(f"/dead-letter/{first['id']}/retry", {})).status == 200
    assert (await morgue.admin.delete(f"/dead-letter/{second['id']}")).status == 204
    await fill(morgue, 1)
    await frozen.pass_seconds(morgue, 5)
    found = await read(morgue, batch)
    assert (found["status"], found["matched"], found["requeued"]) == ("done", 3, 1)
    assert [each["id"] for each in found["skipped"]] == [first["id"], second["id"]]
    assert found["skipped"][0]["reason"] == "already_retried"
    assert (await morgue.read(tasks[2]))["status"] == "pending"
    assert {each["id"] for each in await morgue.letters()}.isdisjoint({third["id"]})
    assert len(await morgue.letters()) == 2


async def test_a_letter_whose_retry_raises_is_skipped_and_the_others_are_retried(
    morgue: Morgue, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, retry = await fill(morgue, 3), DeadLetterQueue.retry_letter

    def raise_for_one(self: DeadLetterQueue, letter_id: str, *arguments: Any, **named: Any) -> Any:
        found = retry(self, letter_id, *arguments, **named)
        if find_letter(letter_id).task_id == tasks[1]:
            raise RuntimeError("a fault")
        return found

    monkeypatch.setattr(DeadLetterQueue, "retry_letter", raise_for_one)
    broken = await morgue.letter(tasks[1])
    batch = await start(morgue, rate_per_second=50)
    await frozen.pass_seconds(morgue, 1)
    found = await read(morgue, batch)
    assert (found["status"], found["requeued"]) == ("done", 2), found
    assert [each["id"] for each in found["skipped"]] == [broken["id"]]
    assert found["skipped"][0]["reason"].startswith("The retry failed unexpectedly")
    assert [(await morgue.read(task))["status"] for task in tasks] == ["pending", "failed", "pending"]
    assert (await morgue.letter(tasks[1]))["status"] == "open"


async def test_a_batch_whose_database_fails_goes_on_later_and_skips_nothing(
    morgue: Morgue, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise peewee.OperationalError("database is locked")

    await fill(morgue, 2)
    batch = await start(morgue, rate_per_second=50)
    with monkeypatch.context() as broken:
        broken.setattr(DeadLetterQueue, "retry_letter", fail)
        await morgue.kit.run_jobs()
    found = await read(morgue, batch)
    assert (found["status"], found["requeued"], found["skipped"]) == ("running", 0, [])
    await frozen.pass_seconds(morgue, 60)
    found = await read(morgue, batch)
    assert (found["status"], found["requeued"], found["skipped"]) == ("done", 2, [])


async def test_a_batch_pauses_while_the_kill_switch_is_on(morgue: Morgue, frozen: Frozen) -> None:
    await fill(morgue, 3)
    engaged = await morgue.admin.post("/admin/kill-switch", {"engaged": True, "reason": "a test"})
    assert engaged.status == 200, engaged
    batch = await start(morgue, rate_per_second=50)
    await frozen.pass_seconds(morgue, 3)
    assert ((await read(morgue, batch))["status"], (await read(morgue, batch))["requeued"]) == ("running", 0)
    assert (await morgue.admin.post("/admin/kill-switch", {"engaged": False})).status == 200
    await frozen.pass_seconds(morgue, 3)
    assert ((await read(morgue, batch))["status"], (await read(morgue, batch))["requeued"]) == ("done", 3)


async def test_a_batch_stops_after_20_failures_in_a_row_and_when_it_is_cancelled(
    morgue: Morgue, frozen: Frozen
) -> None:
    await fill(morgue, 60)
    batch = await start(morgue, rate_per_second=20)
    while (found := await read(morgue, batch))["status"] == "running":
        await frozen.pass_seconds(morgue, 0.25)
        for task in (await morgue.member.get("/tasks?status=pending&limit=200")).json()["items"]:
            await morgue.dead_by_owner(task["id"])
    assert (found["status"], found["reason"]) == ("cancelled", "failing")
    assert 20 <= found["requeued"] < 60
    other = await start(morgue, rate_per_second=1)
    await frozen.pass_seconds(morgue, 0.5)
    cancelled = await morgue.admin.post(f"{other}/cancel", {})
    assert (cancelled.json()["status"], cancelled.json()["reason"]) == ("cancelled", "person")
    await frozen.pass_seconds(morgue, 3)
    assert (await read(morgue, other))["requeued"] == cancelled.json()["requeued"]
    assert (await morgue.admin.post(f"{other}/cancel", {})).code == "invalid_state"


@pytest.mark.one_engine
async def test_a_batch_whose_job_gave_up_makes_room_for_the_next_one(
    morgue: Morgue, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Conflict("a fault")  # other errors put the plugin in quarantine, as they all come within a second

    monkeypatch.setattr(DeadLetterBatches, "_retry_due", fail)
    await fill(morgue, 2)
    batch = await start(morgue)
    for _ in range(19):
        await morgue.kit.run_jobs()
        frozen.seconds += 601
    await morgue.kit.run_schedule("dead_letter.check")
    morgue.admin = await morgue.kit.sign_in(morgue.admin.user["email"])
    assert (await read(morgue, batch))["status"] == "running"
    await morgue.kit.run_jobs()
    await morgue.kit.run_schedule("dead_letter.check")
    found = await read(morgue, batch)
    assert (found["status"], found["reason"]) == ("cancelled", "error")
    monkeypatch.undo()
    await start(morgue)


@pytest.mark.slow
def test_dead_letter_4_a_killed_server_loses_and_doubles_no_letter(
    database_url: str, tmp_path: Path, long_form: bool
) -> None:
    """Short form: 40 letters at 20 a second; long form: 100 at 5 a second."""
    count, rate = (100, 5) if long_form else (40, 20)
    with ServerProcess(tmp_path, database_url=database_url) as server:
        with server.sign_in() as client:
            tasks = [client.post("/tasks", json={"title": f"dead {n}"}).json()["id"] for n in range(count)]
            for task_id in tasks:
                body = {"error": {"type": "Boom", "message": "x"}}
                assert client.post(f"/tasks/{task_id}/fail", json=body).status_code == 200
            batch = client.post("/dead-letter/retry-all", json={"rate_per_second": rate}).json()
            while client.get(f"/dead-letter/batches/{batch['id']}").json()["requeued"] < count / 3:
                time.sleep(0.05)
        server.kill()
        server.start()
        with server.sign_in() as client:
            until = time.monotonic() + count / rate + SLACK_SECONDS
            while (found := client.get(f"/dead-letter/batches/{batch['id']}").json())["status"] == "running":
                assert time.monotonic() < until, found
                time.sleep(0.1)
            assert (found["status"], found["requeued"], found["skipped"]) == ("done", count, [])
            states = [client.get(f"/tasks/{task_id}").json() for task_id in tasks]
            assert {each["reopened_count"] for each in states} == {1}
            assert client.get("/dead-letter/stats").json()["total"] == 0
