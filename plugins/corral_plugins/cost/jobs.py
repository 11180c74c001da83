"""Background jobs of cost accounting."""

from __future__ import annotations

import functools
from collections.abc import Callable

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.consumers import Subscriber
from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_plugins.cost.service import maintenance, rollups
from corral_plugins.cost.service.day_buckets import DAY, day_of
from corral_plugins.cost.settings import EVENT_RETENTION_DAYS

RECONCILED_DAYS = 2
MAX_BATCHES = 200
"""The maximum number of batches that one run of the job deletes. The next run deletes the rest."""


async def reconcile_rollups(work: Work) -> None:
    """Compare the rollups of today and yesterday with the cost events. Correct any differences and raise an alert."""
    entry = UnitContext(label="job cost.reconcile", actor=SYSTEM)
    today = day_of(clock.now())
    for day in range(today - RECONCILED_DAYS + 1, today + 1):
        for series in maintenance.RECONCILED_SERIES:
            found = await work(functools.partial(maintenance.find_differences, series, day), entry=entry, read=True)
            if found:
                await work(functools.partial(maintenance.correct_rollups, found), entry=entry)


async def delete_expired_events(work: Work, settings: Settings) -> None:
    """Delete cost events and detailed rollups whose retention period has ended."""
    days = settings.get(EVENT_RETENTION_DAYS)
    if days is not None:
        await _repeat_in_batches(work, functools.partial(maintenance.delete_events, clock.now(-days * DAY)))
    await _repeat_in_batches(work, maintenance.delete_quarter_hours)
    await _repeat_in_batches(work, maintenance.delete_task_days)


async def _repeat_in_batches(work: Work, delete_batch: Callable[[], int]) -> None:
    entry = UnitContext(label="job cost.prune", actor=SYSTEM)
    for _ in range(MAX_BATCHES):
        if await work(delete_batch, entry=entry) < maintenance.BATCH_ROWS:
            return


SCHEDULES = (Schedule("cost.reconcile", 3600, reconcile_rollups), Schedule("cost.prune", 3600, delete_expired_events))
SUBSCRIBERS = (Subscriber("cost.outcomes", rollups.OUTCOME_EVENTS, rollups.record_outcome_event),)
