"""A change of a run while its advance is being written. On SQLite, only one unit of work writes at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psycopg
import pytest
from tests.plugins.workflows.conftest import World, step

from corral.jobs.job import JobRow
from corral_plugins.workflows.models import Run
from corral_plugins.workflows.service.wakeups import JOB, claim_advance, wake

SECONDS = 60.0


@pytest.mark.parametrize("change", [wake, claim_advance])
async def test_a_change_while_an_advance_is_written_is_not_lost(
    world: World, database_url: str, change: Callable[[str], bool | None]
) -> None:
    run_id = await world.start(await world.workflow(step("ask", "input", {"prompt": "?"})))
    await world.until(run_id, "waiting")
    await world.kit.work(lambda: Run.update(queued_at="earlier").where(Run.id == run_id).execute())
    if world.kit.kernel.database.kind == "postgresql":
        changing = await change_while_an_advance_is_written(world, database_url, lambda: change(run_id))
    else:
        await world.kit.work(lambda: Run.update(queued_at="").where(Run.id == run_id).execute())
        changing = await world.kit.work(lambda: change(run_id))
    assert changing
    run = await world.kit.work(lambda: Run.get_by_id(run_id), read=True)
    assert run.queued_at != "", "nothing advances the run"
    jobs = await world.kit.work(lambda: list(JobRow.select().where(JobRow.name == JOB)), read=True)
    assert (jobs[-1].state == "queued") is (change is wake)


async def change_while_an_advance_is_written(
    world: World, database_url: str, change: Callable[[], bool | None]
) -> bool | None:
    """Make a change that waits for the lock of an advance, which removes the mark. Return what the change returns."""
    async with await psycopg.AsyncConnection.connect(database_url) as advance:
        await advance.execute("UPDATE workflows_runs SET queued_at = '', revision = revision + 1")
        changing = asyncio.ensure_future(world.kit.work(change))
        await until_blocked(database_url)
        await advance.commit()
    found: bool | None = await changing
    return found


async def until_blocked(database_url: str) -> None:
    """Wait until a connection to the database waits for a lock."""
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with (
        asyncio.timeout(SECONDS),
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as watcher,
    ):
        while True:
            found = await (await watcher.execute(blocked)).fetchone()
            if found is not None and found[0]:
                return
            await asyncio.sleep(0.01)
