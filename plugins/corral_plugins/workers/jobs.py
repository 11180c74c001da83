"""Schedules and event subscribers of the `workers` plugin."""

from __future__ import annotations

from corral.database.engine import Work
from corral.events.consumers import Subscriber
from corral.jobs.job import Schedule
from corral_plugins.workers.service import repository
from corral_plugins.workers.service.liveness import WorkerSweeps
from corral_plugins.workers.service.registration import delete_expired

SWEEP_SECONDS, DAY = 5, 86_400


async def sweep_silent_workers(sweeps: WorkerSweeps) -> None:
    """Mark workers that have stopped making calls as `offline`.

    Alert admins if a task has been waiting for 60 s and no worker is online.
    """
    await sweeps.sweep_silent_workers()


async def delete_old_workers(sweeps: WorkerSweeps, work: Work) -> None:
    """Delete old workers and old registration keys.

    Workers are deleted when they have been offline for `workers.prune_days`, and keys 30 days after they have
    expired.
    """
    await sweeps.delete_old_workers()
    await work(delete_expired)


SCHEDULES = (
    Schedule(name="workers.sweep", every=SWEEP_SECONDS, run=sweep_silent_workers),
    Schedule(name="workers.prune", every=DAY, run=delete_old_workers),
)
SUBSCRIBERS = (Subscriber(name="workers.failures", events=repository.EVENTS, handle=repository.record_task_failure),)
