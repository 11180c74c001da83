"""Schedules of workers, and what they learn from events of tasks."""

from __future__ import annotations

from corral.events.consumers import Subscriber
from corral.jobs.job import Schedule
from corral_plugins.workers.service import failures
from corral_plugins.workers.service.sweeps import Sweeps

SWEEP_SECONDS, DAY = 5, 86_400


async def sweep(sweeps: Sweeps) -> None:
    """Take silent workers offline; tell when tasks wait for a worker."""
    await sweeps.sweep()


async def prune(sweeps: Sweeps) -> None:
    """Remove workers that were not heard for long."""
    await sweeps.prune()


SCHEDULES = (
    Schedule(name="workers.sweep", every_seconds=SWEEP_SECONDS, run=sweep),
    Schedule(name="workers.prune", every_seconds=DAY, run=prune),
)
SUBSCRIBERS = (Subscriber(name="workers.failures", events=failures.EVENTS, handle=failures.remember),)
