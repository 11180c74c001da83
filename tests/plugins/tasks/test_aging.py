"""What has waited keeps what it has waited, whatever its owner changes meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engines import SQLITE

from corral.database.unit import current
from corral.plugin import Settings
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.models import Task
from corral_plugins.tasks.service import statistics, timers

AGING = 600


async def wait(world: Any, rounds: int) -> None:
    """Let `rounds` times the seconds of one step pass; sessions end meanwhile."""
    for _ in range(rounds):
        await world.pass_time(AGING + 1)
    world.member = await world.kit.sign_in(world.member.user["email"])
    await world.worker.client.post(f"/workers/{world.worker.id}/heartbeat", {})


async def patch(world: Any, task_id: str, **fields: Any) -> Any:
    answer = await world.member.patch(f"/tasks/{task_id}", fields)
    assert answer.status == 200, answer
    return answer.json()


async def columns(world: Any, task_id: str, *names: str) -> tuple[Any, ...]:
    def read() -> tuple[Any, ...]:
        row = Task.get_by_id(task_id)
        return tuple(getattr(row, name) for name in names)

    found: tuple[Any, ...] = await world.kit.kernel.database.work(read, read=True)
    return found


async def test_raising_the_priority_of_what_has_waited_lowers_nothing(world: Any) -> None:
    old = await world.task("old", priority="low")
    await wait(world, 4)
    await world.task("new", priority="critical")
    await patch(world, old, priority="medium")
    assert (await world.worker.claim()).task_id == old


@pytest.mark.one_engine
async def test_a_new_priority_counts_what_was_waited_and_goes_on_growing(world: Any) -> None:
    task_id = await world.task(priority="high")
    await wait(world, 1)
    await patch(world, task_id, priority="low")
    assert (await columns(world, task_id, "rank"))[0] == 1
    await wait(world, 2)
    assert (await columns(world, task_id, "rank"))[0] == 3
    await wait(world, 1)
    assert (await columns(world, task_id, "rank"))[0] == 4
    await wait(world, 2)
    assert (await columns(world, task_id, "rank"))[0] == 4


async def test_a_queue_timeout_counts_from_the_beginning_of_the_wait(world: Any) -> None:
    task_id = await world.task(priority="low")
    await wait(world, 2)
    before = await columns(world, task_id, "queued_at", "rank")
    await patch(world, task_id, queue_timeout_seconds=3600, available_at="2020-01-01T00:00:00Z")
    assert await columns(world, task_id, "queued_at", "rank") == before
    await wait(world, 4)
    assert (await world.read(task_id))["error"]["kind"] == "queue_timeout"


async def test_what_is_put_off_waits_anew(world: Any) -> None:
    task_id = await world.task(priority="low")
    await wait(world, 2)
    await patch(world, task_id, available_at="2090-01-01T00:00:00Z")
    told = await columns(world, task_id, "queue", "rank", "queued_at")
    assert told == (None, 0, "2090-01-01T00:00:00.000Z")


async def test_what_was_queued_while_nothing_aged_ages_once_it_does(world: Any, monkeypatch: Any) -> None:
    settings: Any = type(world.kit.kernel.container.get(Settings))
    read, name = settings.get, declared.AGING_SECONDS.name
    monkeypatch.setattr(settings, "get", lambda self, which: 0 if which.name == name else read(self, which))
    task_id = await world.task(priority="low")
    await wait(world, 2)
    assert (await columns(world, task_id, "rank"))[0] == 0
    monkeypatch.setattr(settings, "get", read)
    await world.tick()
    assert (await columns(world, task_id, "rank"))[0] == 2


async def test_a_blocked_task_becomes_pending_with_all_that_was_changed(world: Any) -> None:
    needed = await world.task("needed", available_at="2090-01-01T00:00:00Z")
    task_id = await world.task("waits", depends_on=[needed], priority="low")
    told = await patch(
        world,
        task_id,
        depends_on=[],
        available_at="2080-01-01T00:00:00Z",
        priority="critical",
        deadline="2091-01-01T00:00:00Z",
        queue_timeout_seconds=60,
    )
    assert (told["status"], told["available_at"]) == ("pending", "2080-01-01T00:00:00.000Z")
    assert await columns(world, task_id, "rank", "queue", "deadline_key", "queue_until") == (
        3,
        None,
        "2091-01-01T00:00:00.000Z",
        "2080-01-01T00:01:00.000Z",
    )


@SQLITE
async def test_one_index_serves_the_aging_of_ranks_and_the_age_of_the_oldest_task(world: Any) -> None:
    await world.task()
    given = {"rank": 1, "priority": 1, "due": "2026-01-01T00:00:00.000Z", "limit": 500}

    def plan(statement: Any) -> str:
        statement.rows(given)
        sql, bind = statement._compiled["sqlite"]
        return str(current().connection.execute(f"EXPLAIN QUERY PLAN {sql}", bind(given)).fetchall())

    for statement in (timers._DUE_TO_RISE, statistics._OLDEST):
        found = await world.kit.kernel.database.work(lambda statement=statement: plan(statement), read=True)
        assert "tasks_tasks_waiting_since (status=? AND rank=? AND priority=?" in found, found
        assert "TEMP B-TREE" not in found, found
