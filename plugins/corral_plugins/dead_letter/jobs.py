"""Background jobs of the dead letter queue, which retry tasks, add missing letters, raise alerts and delete letters."""

from __future__ import annotations

import logging

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.consumers import Subscriber
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule, enqueue
from corral_plugins.dead_letter.service.batches import JOB, DeadLetterBatches
from corral_plugins.dead_letter.service.maintenance import DeadLetterMaintenance

log = logging.getLogger("corral.dead_letter")

CHECK_SECONDS = 60
MARGIN_SECONDS = 5.0
"""The number of seconds allowed for transactions to commit. A task that failed more recently may not be visible yet."""


def run_batch_step(batch_id: str, batches: DeadLetterBatches) -> None:
    """Retry as many dead letters of a batch as its rate allows now, and enqueue the next step of the batch."""
    batches.run_step(batch_id)


async def add_missing_letters(work: Work, maintenance: DeadLetterMaintenance) -> None:
    """Add dead letters for tasks that failed while the plugin was not active."""
    entry = UnitContext(label="job dead_letter.complete", actor=SYSTEM)
    until = clock.now(-MARGIN_SECONDS)
    place: str | None = await work(maintenance.complete_until, entry=entry, read=True)
    while place is not None:
        place = await work(lambda after=place: maintenance.add_missing(after), entry=entry)  # type: ignore[misc]  # bound per iteration
    await work(lambda: maintenance.set_complete_until(until), entry=entry)


async def check_queue(work: Work, maintenance: DeadLetterMaintenance, batches: DeadLetterBatches) -> None:
    """Add missing dead letters, record the time of this check, and alert admins if the queue grows too fast.

    Also cancel the running batch if its job has failed too often.
    """
    entry = UnitContext(label="job dead_letter.check", actor=SYSTEM)
    await work(batches.end_abandoned, entry=entry)
    until: str = await work(maintenance.complete_until, entry=entry, read=True)
    if not maintenance.has_checked or until < clock.now(-1.5 * CHECK_SECONDS):  # the plugin may have been disabled
        await add_missing_letters(work, maintenance)
        maintenance.has_checked = True
    await work(lambda: maintenance.set_complete_until(clock.now(-MARGIN_SECONDS)), entry=entry)
    await work(maintenance.alert_about_growth, entry=entry)


def backfill_after_state_change(event: LoggedEvent) -> None:
    """If the state of this plugin has changed, enqueue a job that adds missing dead letters."""
    if event.payload().get("name") == "dead_letter":
        enqueue("dead_letter.complete")


async def delete_old_letters(work: Work, maintenance: DeadLetterMaintenance) -> None:
    """Delete dead letters past their retention period, and those that exceed the maximum number."""
    entry = UnitContext(label="job dead_letter.prune", actor=SYSTEM)
    for what, delete in (("expired", maintenance.delete_expired), ("surplus", maintenance.delete_surplus)):
        total = 0
        while count := await work(delete, entry=entry):
            total += count
        if total:
            log.info("dead letters purged", extra={"why": what, "count": total})


JOBS = (
    Job(JOB, run_batch_step, max_attempts=20, lease_seconds=15),
    Job("dead_letter.complete", add_missing_letters),
)
SUBSCRIBERS = (Subscriber("dead_letter.completeness", ("plugin.state",), backfill_after_state_change),)
SCHEDULES = (
    Schedule("dead_letter.check", CHECK_SECONDS, check_queue),
    Schedule("dead_letter.prune", 86_400, delete_old_letters),
)
