"""Background jobs of the `cost` plugin."""

from __future__ import annotations

import functools
from collections.abc import Callable

from corral import clock
from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.consumers import Subscriber
from corral.jobs.job import Job, Schedule
from corral.plugin import Settings
from corral_plugins.cost.service import installation_budget, maintenance, rollups
from corral_plugins.cost.service.budget_counters import CANCEL_JOB
from corral_plugins.cost.service.budget_maintenance import BudgetMaintenance
from corral_plugins.cost.service.day_buckets import DAY, day_of
from corral_plugins.cost.service.price_updates import PriceUpdates
from corral_plugins.cost.settings import EVENT_RETENTION_DAYS

RECONCILED_DAYS = 2
OLD_PERIOD_DAYS = 62
"""The age in days at which the counters and alerts of past budget periods are deleted."""
MAX_BATCHES = 200
"""The maximum number of batches that one run of a job processes. The next run processes the rest."""


async def reconcile_rollups(work: Work) -> None:
    """Compare the rollups of today and yesterday with the cost events. Correct any differences and raise an alert."""
    entry = UnitContext(label="job cost.reconcile", actor=SYSTEM)
    today = day_of(clock.now())
    for day in range(today - RECONCILED_DAYS + 1, today + 1):
        for series in maintenance.RECONCILED_SERIES:
            found = await work(functools.partial(maintenance.find_differences, series, day), entry=entry, read=True)
            if found:
                await work(functools.partial(maintenance.correct_rollups, found), entry=entry)


async def reconcile_budgets(work: Work, upkeep: BudgetMaintenance) -> None:
    """Compare the budget counters with the costs and reservations. Correct any differences and raise an alert."""
    entry = UnitContext(label="job cost.reconcile", actor=SYSTEM)
    for limit in await work(upkeep.limits, entry=entry, read=True):
        await work(functools.partial(upkeep.reconcile, limit), entry=entry)


async def reconcile(work: Work, upkeep: BudgetMaintenance) -> None:
    """Correct the rollups and the budget counters: run `reconcile_rollups`, and then `reconcile_budgets`."""
    await reconcile_rollups(work)
    await reconcile_budgets(work, upkeep)


async def release_expired_reservations(database: Database, upkeep: BudgetMaintenance) -> None:
    """Release expired reservations, whose attempts or calls have probably crashed."""
    entry = UnitContext(label="job cost.reap", actor=SYSTEM)
    for _ in range(MAX_BATCHES):
        if not await database.read(upkeep.has_expiring, entry):
            return
        if await database.work(upkeep.release_expired, entry=entry) < maintenance.BATCH_ROWS:
            return


async def begin_period(database: Database, upkeep: BudgetMaintenance) -> None:
    """Create the counters of a new budget period, and resume paused agents whose budget allows spending again."""
    entry = UnitContext(label="job cost.period", actor=SYSTEM)
    if await database.read(upkeep.lacks_counters, entry):
        for _ in range(MAX_BATCHES):
            if await database.work(upkeep.create_counters, entry=entry) < maintenance.BATCH_ROWS:
                break
    if await database.read(upkeep.has_paused_agents, entry):
        await database.work(upkeep.resume_agents, entry=entry)


def cancel_running(agent_id: str | None, upkeep: BudgetMaintenance, after: str = "") -> None:
    """Cancel running attempts that hold reservations, because the budget is exceeded.

    If `agent_id` is given, only that agent's attempts are cancelled.
    """
    upkeep.cancel_running(agent_id, after)


async def delete_expired_events(work: Work, settings: Settings) -> None:
    """Delete cost events and detailed rollups that are past their retention period."""
    days = settings.get(EVENT_RETENTION_DAYS)
    if days is not None:
        await _repeat_in_batches(work, functools.partial(maintenance.delete_events, clock.now(-days * DAY)))
    await _repeat_in_batches(work, maintenance.delete_quarter_hours)
    await _repeat_in_batches(work, maintenance.delete_task_days)
    await work(lambda: installation_budget.delete_old_periods(clock.now(-OLD_PERIOD_DAYS * DAY)))


async def _repeat_in_batches(work: Work, delete_batch: Callable[[], int]) -> None:
    entry = UnitContext(label="job cost.prune", actor=SYSTEM)
    for _ in range(MAX_BATCHES):
        if await work(delete_batch, entry=entry) < maintenance.BATCH_ROWS:
            return


async def update_prices(updates: PriceUpdates) -> None:
    """Fetch a newer price table once a day, if the setting `cost.update_prices` is on."""
    await updates.fetch()


JOBS = (Job(CANCEL_JOB, cancel_running),)
SCHEDULES = (
    Schedule("cost.reconcile", 3600, reconcile),
    Schedule("cost.reap", 4, release_expired_reservations),  # within 5 s, also on a busy machine
    Schedule("cost.period", 4, begin_period),
    Schedule("cost.prune", 3600, delete_expired_events),
    Schedule("cost.update_prices", 600, update_prices),  # fetches once a day, and soon after it was switched on
)
SUBSCRIBERS = (Subscriber("cost.outcomes", rollups.OUTCOME_EVENTS, rollups.record_outcome_event),)
