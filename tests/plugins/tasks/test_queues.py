"""Which queues a claim looks into: those that have a task, however many sets of tools were ever required."""

from __future__ import annotations

import itertools
from typing import Any

from tests.engines import SQLITE

from corral.database.unit import current
from corral.ids import new_id
from corral_plugins.tasks.api import Tasks
from corral_plugins.tasks.models import Task
from corral_plugins.tasks.service import claims, rows


async def test_no_set_of_tools_is_one_too_many(world: Any) -> None:
    await world.member.patch(f"/agents/{world.agent_id}", {"enabled_tools": ["x.*"]})
    pairs = itertools.combinations([f"x.t{n}" for n in range(40)], 2)
    for pair in itertools.islice(pairs, 500):
        await world.task(required_tools=pair, priority="low")
    last = await world.task(required_tools=["x.last"])
    assert (await world.member.get(f"/tasks/{last}/explain")).json()["claimable"] is True
    assert (await world.worker.claim()).task_id == last


async def test_only_what_has_a_task_is_looked_into(world: Any) -> None:
    async def tooled() -> list[tuple[str, list[str]]]:
        def read() -> list[tuple[str, list[str]]]:
            return [
                (queue.partition("#")[0], rows.parse_json_text(tools)) for queue, tools in claims._queues_with_tools()
            ]

        found: list[tuple[str, list[str]]] = await world.kit.kernel.database.work(read, read=True)
        return found

    ids = [await world.task(required_tools=["x.a", "x.b"]) for _ in range(3)]
    await world.task(required_tools=["x.c"], available_at="2090-01-01T00:00:00Z")
    await world.task()
    named = await world.task(required_tools=["x.d"], agent_id=world.agent_id)
    assert await tooled() == [(f"agent:{world.agent_id}", ["x.d"]), ("any", ["x.a", "x.b"])]
    for task_id in [*ids, named]:
        await world.member.post(f"/tasks/{task_id}/cancel", {})
    assert await tooled() == []


@SQLITE
async def test_the_look_is_served_by_its_index(world: Any) -> None:
    """Not by that of the claim, which holds every task that needs no tools too."""

    def plan() -> str:
        return str(current().connection.execute(f"EXPLAIN QUERY PLAN {claims._TOOLED}", ()).fetchall())

    told = await world.kit.kernel.database.work(plan, read=True)
    assert told.count("SEARCH t USING") == told.count("tasks_tasks_tooled (status=? AND queue") == 3, told


async def test_people_who_are_gone_do_not_keep_the_tasks_of_others_held(world: Any) -> None:
    task_id = await world.task()

    def hold() -> None:
        values = dict(Task.get_by_id(task_id).__data__)
        for n in range(101):
            nobody = f"00000000-0000-7000-8000-{n:012d}"
            Task.insert({**values, "id": new_id(), "created_by": nobody, "queue": "held"}).execute()
        Task.update(queue="held").where(Task.id == task_id).execute()

    await world.kit.kernel.database.work(hold)
    await world.tick()
    assert (await world.worker.claim()).task_id == task_id


async def test_a_task_that_is_scheduled_for_later_is_pending_but_not_the_oldest(world: Any) -> None:
    def read() -> tuple[int, str | None]:
        queue = world.kit.kernel.container.get(Tasks).queue_statistics()
        return queue.depth, queue.oldest_pending_id

    await world.task(available_at="2090-01-01T00:00:00Z")
    assert await world.kit.kernel.database.work(read, read=True) == (1, None)
    queued = await world.task()
    assert await world.kit.kernel.database.work(read, read=True) == (2, queued)
