"""Background jobs of the `tasks` plugin.

To keep units of work short, a job finds the affected tasks in one unit of work, and then checks and changes each task
in a separate unit of work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Problem
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule, enqueue
from corral_plugins.tasks.service import outcomes, queries
from corral_plugins.tasks.service.leases import TaskLeases
from corral_plugins.tasks.service.outcomes import TaskOutcomes
from corral_plugins.tasks.service.retention import TaskRetention, purge_rows
from corral_plugins.tasks.service.timers import BATCH_SIZE, TaskTimers

log = logging.getLogger("corral.tasks")
ROUNDS = 20
"""The maximum number of batches that one run of a job handles. The next scheduled run handles the rest."""


async def end_overdue_tasks(database: Database, timers: TaskTimers) -> None:
    """End every task, lease and question that has exceeded its time limit."""
    await _handle_each(database, "job tasks.reap", timers.find_overdue_tasks, timers.end_overdue_task)


async def report_idle_runs(database: Database, timers: TaskTimers) -> None:
    """Report runs that have been inactive for longer than their stall policy allows."""
    await _handle_each(database, "job tasks.watchdog", timers.find_idle_runs, timers.report_idle_run)


async def _handle_each(
    database: Database, label: str, find: Callable[[], list[str]], act: Callable[[str], None]
) -> None:
    entry = UnitContext(label=label, actor=SYSTEM)
    for _ in range(ROUNDS):
        found = await database.read(find, entry)
        for task_id in found:
            try:
                await database.work(lambda task_id=task_id: act(task_id), entry=entry)  # type: ignore[misc]  # bound per iteration
            except Problem:
                log.warning("overdue task skipped", extra={"task": task_id}, exc_info=True)
        if len(found) < BATCH_SIZE:
            return


async def queue_due_tasks(database: Database, timers: TaskTimers) -> None:
    """Queue tasks that have become available, raise the ranks of waiting tasks, and add page anchors.

    A task becomes available at its `available_at` time, or when its inactive requester becomes active again. A page
    anchor is a saved position in the list of tasks that makes paging by offset fast.
    """
    entry = UnitContext(label="job tasks.announce", actor=SYSTEM)
    if not await database.read(timers.has_waiting_work, entry):
        return
    for step in (timers.queue_available_tasks, timers.queue_tasks_of_active_requesters, timers.raise_ranks):
        for _ in range(ROUNDS):
            if await database.work(step, entry=entry) < BATCH_SIZE:
                break
    for _ in range(ROUNDS * 10):
        if not await database.work(queries.extend_anchors, entry=entry):
            break


async def index_new_tasks(work: Work) -> None:
    """Add new tasks to the full-text index."""
    entry = UnitContext(label="job tasks.index", actor=SYSTEM)
    for _ in range(ROUNDS * 10):
        if not await work(queries.index_next_tasks, entry=entry):
            break


async def delete_expired_rows(work: Work, retention: TaskRetention) -> None:
    """Delete tasks, worker signals and hourly statistics whose retention period has ended."""
    entry = UnitContext(label="job tasks.sweep", actor=SYSTEM)
    while await work(retention.delete_expired_rows, entry=entry):
        continue


def purge_deleted_task(task_id: str) -> None:
    """Delete the attempts, logs and comments of a deleted task, in batches."""
    if purge_rows(task_id):
        enqueue("tasks.purge", task_id=task_id)


def unblock_dependents(task_id: str, after: str) -> None:
    """Queue the next batch of tasks that were blocked only by a task that is now completed."""
    outcomes.unblock_dependents(task_id, after)


def fail_dependents(task_id: str) -> None:
    """Fail the next batch of tasks that depend on a failed task."""
    outcomes.fail_dependents(task_id)


def reblock_dependents(task_id: str) -> None:
    """Block the next batch of tasks that failed only because of a task that is now being retried."""
    outcomes.reblock_dependents(task_id)


def cancel_children(task_id: str, outcomes: TaskOutcomes) -> None:
    """Cancel the next batch of tasks that were created by a cancelled task."""
    outcomes.cancel_children(task_id)


def cancel_all_leased(reason: str, before: str, leases: TaskLeases) -> None:
    """Request the cancellation of the next batch of tasks that were leased when the kill switch was activated."""
    leases.cancel_all_leased(reason=reason, before=before)


def enqueue_cancel_for_purged_user(event: LoggedEvent) -> None:
    """Enqueue the job that cancels the open tasks of a purged user."""
    enqueue("tasks.cancel_of", user_id=event.object_id)


def cancel_tasks_of_user(user_id: str, leases: TaskLeases) -> None:
    """Cancel a batch of open tasks of a purged user, and enqueue this job again if more might remain."""
    if leases.cancel_tasks_of_user(user_id):
        enqueue("tasks.cancel_of", user_id=user_id)


JOBS = (
    Job("tasks.cancel_of", cancel_tasks_of_user),
    Job("tasks.cancel_all_leased", cancel_all_leased),
    Job("tasks.purge", purge_deleted_task),
    Job("tasks.unblock", unblock_dependents),
    Job("tasks.fail_dependents", fail_dependents),
    Job("tasks.reblock", reblock_dependents),
    Job("tasks.cancel_children", cancel_children),
)
SCHEDULES = (
    Schedule("tasks.reap", 4, end_overdue_tasks),  # a lost lease is reclaimed within 5 s, also on a busy machine
    Schedule("tasks.watchdog", 15, report_idle_runs),
    Schedule("tasks.announce", 5, queue_due_tasks),
    Schedule("tasks.index", 5, index_new_tasks),
    Schedule("tasks.sweep", 86_400, delete_expired_rows),
)
