"""Schedules that end expired probes and overdue half-open phases, raise alerts and delete old transitions."""

from __future__ import annotations

from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_plugins.circuit_breakers.service.administration import delete_old_transitions
from corral_plugins.circuit_breakers.service.transitions import BreakerTransitions
from corral_plugins.circuit_breakers.settings import TRANSITION_DAYS

SWEEP_SECONDS = 3  # a lost probe is noticed within 5 s, with time left to decide
HOUR = 3600
BATCH_ROWS = 500
SWEEP = UnitContext(label="job circuit_breakers.sweep", actor=SYSTEM)
PRUNE = UnitContext(label="job circuit_breakers.prune", actor=SYSTEM)


async def end_overdue_breakers(database: Database, transitions: BreakerTransitions) -> None:
    """Count probes with expired permits as failures, end overdue half-open phases, and raise alerts."""
    for name in await database.read(transitions.find_overdue, SWEEP):
        await database.work(lambda name=name: transitions.end_overdue(name), entry=SWEEP)  # type: ignore[misc]  # bound now
    if await database.read(transitions.find_unalerted, SWEEP):
        await database.work(transitions.raise_alerts, entry=SWEEP)


async def prune_transitions(work: Work, settings: Settings) -> None:
    """Delete transitions whose retention period has ended."""
    days = settings.get(TRANSITION_DAYS)
    while await work(lambda: delete_old_transitions(days, BATCH_ROWS), entry=PRUNE) == BATCH_ROWS:
        continue


SCHEDULES = (
    Schedule("circuit_breakers.sweep", SWEEP_SECONDS, end_overdue_breakers),
    Schedule("circuit_breakers.prune", HOUR, prune_transitions),
)
