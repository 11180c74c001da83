"""Wakes waiting claims when a parked task becomes available; `tasks.announce` does so should this fail."""

from __future__ import annotations

import asyncio

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral_plugins.tasks.service.clockwork import AT_ONCE, Clockwork

LOOK_EVERY = 0.5
ENTRY = Entry(label="tasks alarm", actor=SYSTEM)


class Alarm:
    """Looks twice a second for the next due task: one look into an index."""

    def __init__(self, work: Work, clockwork: Clockwork) -> None:
        self._work, self._clockwork = work, clockwork

    async def run(self) -> None:
        """For ever; supervised by the kernel."""
        while True:
            due = await self._work(self._clockwork.next_due, entry=ENTRY, read=True)
            while (
                due is not None
                and due <= clock.now()
                and await self._work(self._clockwork.unpark, entry=ENTRY) == AT_ONCE
            ):
                continue
            await asyncio.sleep(LOOK_EVERY)
