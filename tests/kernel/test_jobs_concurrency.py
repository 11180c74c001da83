"""How many jobs run at a time is a setting that rules at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from corral.jobs.job import Job, enqueue
from corral.plugin import Plugin, hookimpl


async def test_jobs_concurrency_rules_while_jobs_run(make_kit: Callable[..., Any]) -> None:
    running, go_on, at_start = 0, asyncio.Event(), list[int]()

    async def work() -> None:
        nonlocal running
        running += 1
        at_start.append(running)
        await go_on.wait()
        await asyncio.sleep(0.05)
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
    await kit.kernel.database.work(lambda: [enqueue("busy.work") for _ in range(8)])
    await until(lambda: running == 2)
    await asyncio.sleep(0.3)
    assert running == 2
    await admin.put("/settings/jobs/concurrency", {"value": 5})
    await until(lambda: running == 5)
    await admin.put("/settings/jobs/concurrency", {"value": 1})
    go_on.set()  # those above the new limit finish first
    await until(lambda: len(at_start) == 8 and running == 0)
    assert at_start == [1, 2, 3, 4, 5, 1, 1, 1]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.02)
