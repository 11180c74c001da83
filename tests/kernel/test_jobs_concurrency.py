"""How many jobs run at a time is a setting that rules at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from corral.jobs.job import Job, enqueue
from corral.jobs.runner import ConcurrencySlots
from corral.plugin import Plugin, hookimpl


async def test_places_come_and_go() -> None:
    room = ConcurrencySlots(1)
    await room.acquire()
    assert room.is_full
    waiting = asyncio.ensure_future(room.acquire())
    await asyncio.sleep(0)
    assert not waiting.done()
    room.resize(2)
    await asyncio.wait_for(waiting, 5)
    room.resize(1)
    room.release()
    assert room.is_full  # one too many still runs
    room.release()
    assert not room.is_full


async def test_jobs_concurrency_rules_while_jobs_run(make_kit: Callable[..., Any]) -> None:
    running, most, go_on = 0, 0, asyncio.Event()

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go_on.wait()
        running -= 1

    class BusyPlugin(Plugin):
        """Jobs."""

        name = "busy"

        @hookimpl
        def corral_jobs(self) -> list[Job]:
            return [Job("busy.work", work)]

    kit = await make_kit(plugins=["settings", BusyPlugin], jobs=True, config={})
    admin = await kit.as_user("admin")
    assert (await admin.put("/settings/jobs/concurrency", {"value": 2})).json()["value"] == 2
    await kit.kernel.database.work(lambda: [enqueue("busy.work") for _ in range(6)])
    await until(lambda: running == 2)
    await asyncio.sleep(0.3)
    assert most == 2
    await admin.put("/settings/jobs/concurrency", {"value": 5})
    await until(lambda: running == 5)
    go_on.set()
    await until(lambda: running == 0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.02)
