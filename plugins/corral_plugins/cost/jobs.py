"""Background work of costs."""

from __future__ import annotations

from collections.abc import Callable

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral.events.consumers import Subscriber
from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_plugins.cost.service import outcomes, reconcile, upkeep
from corral_plugins.cost.service.days import DAY, day_of
from corral_plugins.cost.settings import EVENT_RETENTION_DAYS

CHECKED_DAYS = 2
ROUNDS = 200
"""At most so many chunks a run; the rest is for the next slot."""


async def check(work: Work) -> None:
    """Hold the sums of the present and the last day against their events; correct and tell what differs."""
    entry = Entry(label="job cost.reconcile", actor=SYSTEM)
    today = day_of(clock.now())
    for day in range(today - CHECKED_DAYS + 1, today + 1):
        for kind in reconcile.KINDS:
            found = await work(lambda kind=kind, day=day: reconcile.differences(kind, day), entry=entry, read=True)  # type: ignore[misc]  # bound per round
            if found:
                await work(lambda found=found: reconcile.correct(found), entry=entry)  # type: ignore[misc]  # bound per round


async def prune(work: Work, settings: Settings) -> None:
    """Delete what is kept long enough."""
    days = settings.get(EVENT_RETENTION_DAYS)
    if days is not None:
        before = clock.now(-days * DAY)
        await _repeat(work, lambda: upkeep.prune_events(before))
    await _repeat(work, upkeep.prune_quarters)
    await _repeat(work, upkeep.prune_task_days)


async def _repeat(work: Work, some: Callable[[], int]) -> None:
    entry = Entry(label="job cost.prune", actor=SYSTEM)
    for _ in range(ROUNDS):
        if await work(some, entry=entry) < upkeep.AT_ONCE:
            return


SCHEDULES = (Schedule("cost.reconcile", 3600, check), Schedule("cost.prune", 3600, prune))
SUBSCRIBERS = (Subscriber("cost.outcomes", outcomes.FOLLOWED, outcomes.note),)
