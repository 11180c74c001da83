"""How a job ended is written down, whatever the database does meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.kernel.isolation.misbehaving import plugin, until

from corral import clock
from corral.errors import ExpectedFailure
from corral.jobs.job import Job, JobRow, Schedule, ScheduleRow, enqueue
from corral.testing.database_servers import PostgresServer
from corral.testing.kit import Kit, make_kernel

MakeKit = Callable[..., Awaitable[Kit]]


async def row_of(kit: Kit, name: str) -> JobRow:
    return await kit.kernel.database.work(lambda: JobRow.get(JobRow.name == name), read=True)


@pytest.mark.postgres
async def test_a_job_that_ends_while_the_database_is_away_is_not_stuck(tmp_path: Path) -> None:
    begun: list[str] = []
    ended: list[str] = []
    go_on = asyncio.Event()

    async def done() -> None:
        await go_on.wait()
        ended.append("done")

    async def fails() -> None:
        begun.append("fails")
        await go_on.wait()
        ended.append("fails")
        raise ValueError("it is broken")

    jobs = [Job("worker.done", done), Job("worker.fails", fails, max_attempts=1)]
    tick = Schedule("worker.tick", 3600, fails)
    worker = plugin("worker", corral_jobs=lambda self: jobs, corral_schedules=lambda self: [tick])
    with PostgresServer() as server:
        async with make_kernel(tmp_path, plugins=[worker], database_url=server.create_database(), jobs=True) as kit:

            async def running() -> int:
                rows = JobRow.select().where(JobRow.state == "running")
                return await kit.kernel.database.work(rows.count, read=True)

            await kit.kernel.database.work(lambda: [enqueue(job.name) for job in jobs])
            async with asyncio.timeout(60):
                while await running() < 2:  # noqa: ASYNC110  (nothing tells)
                    await asyncio.sleep(0.05)
            await until(lambda: len(begun) == 2)  # the slot is taken too
            await asyncio.to_thread(server.kill)
            go_on.set()
            await until(lambda: len(ended) == 3)
            await asyncio.sleep(3)
            assert sorted(ended) == ["done", "fails", "fails"]
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(60):
                while await running():  # noqa: ASYNC110  (nothing tells)
                    await asyncio.sleep(0.1)
            assert ((await row_of(kit, "worker.done")).state, ended.count("done")) == ("done", 1)
            failed = await row_of(kit, "worker.fails")
            assert (failed.state, failed.error) == ("failed", "ValueError: it is broken")
            slot = await kit.kernel.database.work(lambda: ScheduleRow.get_by_id("worker.tick"), read=True)
            assert slot.error == "ValueError: it is broken"


async def test_what_a_job_waits_for_is_cancelled(make_kit: MakeKit) -> None:
    runs: list[int] = []

    async def go() -> None:
        runs.append(1)
        inner = asyncio.ensure_future(asyncio.sleep(60))
        inner.cancel()
        await inner

    kit = await make_kit(plugins=[plugin("canceller", corral_jobs=lambda self: [Job("canceller.go", go)])], jobs=True)
    await kit.kernel.database.work(lambda: enqueue("canceller.go"))
    async with asyncio.timeout(60):
        while (row := await row_of(kit, "canceller.go")).state != "queued" or not row.attempts:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (len(runs), row.state, row.attempts) == (1, "queued", 1)
    assert row.error == "ContributionFailed: canceller.go: CancelledError"


async def test_a_job_whose_process_ends_is_given_back(make_kit: MakeKit) -> None:
    runs: list[int] = []

    async def go() -> None:
        runs.append(1)
        await asyncio.sleep(60)

    kit = await make_kit(plugins=[plugin("waiter", corral_jobs=lambda self: [Job("waiter.go", go)])], jobs=True)
    await kit.kernel.database.work(lambda: enqueue("waiter.go"))
    await until(lambda: bool(runs))
    await kit.kernel.supervisor.stop_task("jobs")
    row = await row_of(kit, "waiter.go")
    assert (row.state, row.attempts, row.lease) == ("queued", 0, None)


async def test_schedules_go_on_when_the_clock_is_set_back(make_kit: MakeKit) -> None:
    """By an hour, say: what was written before lies in the future then, here and in the table."""
    runs: list[float] = []
    ticking = plugin(
        "ticking", corral_schedules=lambda self: [Schedule("ticking.tick", 1, lambda: runs.append(clock.time_s()))]
    )
    try:
        kit = await make_kit(plugins=[ticking], jobs=True)
        await until(lambda: len(runs) >= 2)
        clock.travel(-3600)
        before = len(runs)
        await until(lambda: len(runs) >= before + 3, seconds=30)
        slot = await kit.kernel.database.work(lambda: ScheduleRow.get_by_id("ticking.tick"), read=True)
        assert slot.next_at < clock.now(60)
    finally:
        clock.reset()


@pytest.mark.one_engine
async def test_an_expected_failure_is_logged_without_a_traceback(
    make_kit: MakeKit, caplog: pytest.LogCaptureFixture
) -> None:
    def far_away() -> None:
        raise ExpectedFailure("the other server is away")

    def broken() -> None:
        raise ValueError("it is broken")

    jobs = [Job("errand.far_away", far_away, max_attempts=2), Job("errand.broken", broken, max_attempts=1)]
    tick = Schedule("errand.tick", 3600, far_away)
    errand = plugin("errand", corral_jobs=lambda self: jobs, corral_schedules=lambda self: [tick])
    kit = await make_kit(plugins=[errand])
    await kit.work(lambda: [enqueue(job.name) for job in jobs])
    with caplog.at_level(logging.WARNING, "corral.jobs"):
        assert await kit.run_jobs() == 2
        clock.travel(2)
        assert await kit.run_jobs() == 1  # the second and last attempt
        clock.travel(3600)
        assert await kit.run_jobs() == 0
        with pytest.raises(ExpectedFailure):
            await kit.run_schedule("errand.tick")
    lines = [vars(record) for record in caplog.records if record.name == "corral.jobs"]
    failed = {(line.get("job"), line.get("attempt"), line.get("max_attempts")): line for line in lines}
    first, last = failed["errand.far_away", 1, 2], failed["errand.far_away", 2, 2]
    for line in (first, last, failed[None, None, None]):  # the last one is the schedule
        assert (line["error"], line["exc_info"]) == ("ExpectedFailure: the other server is away", None)
    assert failed["errand.broken", 1, 1]["exc_info"][0] is ValueError
    assert (await row_of(kit, "errand.far_away")).state == "failed"
