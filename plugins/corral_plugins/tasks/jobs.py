"""Background jobs of tasks.

Units of work are short: each task that a job finds is checked again and changed in its own unit of work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral.errors import Problem
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule, enqueue
from corral_plugins.tasks.service import dependencies, queries, search
from corral_plugins.tasks.service.leases import Leases
from corral_plugins.tasks.service.outcomes import Outcomes
from corral_plugins.tasks.service.retention import Retention, purge_rows
from corral_plugins.tasks.service.timers import BATCH_SIZE, Timers

log = logging.getLogger("corral.tasks")
ROUNDS = 20
"""The maximum number of batches that one run of a job handles. The next scheduled run handles the rest."""


async def reap(work: Work, timers: Timers) -> None:
    """End tasks whose lease, timeout, deadline or question has expired."""
    await _one_by_one(work, "job tasks.reap", timers.overdue, timers.reap)


async def watchdog(work: Work, timers: Timers) -> None:
    """Report stalled runs."""
    await _one_by_one(work, "job tasks.watchdog", timers.idle, timers.watch)


async def _one_by_one(work: Work, label: str, find: Callable[[], list[str]], act: Callable[[str], None]) -> None:
    entry = Entry(label=label, actor=SYSTEM)
    for _ in range(ROUNDS):
        found = await work(find, entry=entry, read=True)
        for task_id in found:
            try:
                await work(lambda task_id=task_id: act(task_id), entry=entry)  # type: ignore[misc]  # bound per iteration
            except Problem:
                log.warning("timer skipped a task", extra={"task": task_id}, exc_info=True)
        if len(found) < BATCH_SIZE:
            return


async def announce(work: Work, timers: Timers) -> None:
    """Queue tasks that are due or no longer held, raise the rank of waiting tasks, and write page anchors."""
    entry = Entry(label="job tasks.announce", actor=SYSTEM)
    for step in (timers.unpark, timers.unhold, timers.age):
        for _ in range(ROUNDS):
            if await work(step, entry=entry) < BATCH_SIZE:
                break
    for _ in range(ROUNDS * 10):
        if not await work(queries.extend_anchors, entry=entry):
            break


async def index(work: Work) -> None:
    """Add new tasks to the full-text index."""
    entry = Entry(label="job tasks.index", actor=SYSTEM)
    for _ in range(ROUNDS * 10):
        if not await work(search.extend, entry=entry):
            break


async def sweep(work: Work, retention: Retention) -> None:
    """Delete tasks, signals and rollups that are past their retention."""
    entry = Entry(label="job tasks.sweep", actor=SYSTEM)
    while await work(retention.sweep, entry=entry):
        continue


def purge(task_id: str) -> None:
    """Delete the attempts, logs and comments of a deleted task, in batches."""
    if purge_rows(task_id):
        enqueue("tasks.purge", task_id=task_id)


def unblock(task_id: str, after: str) -> None:
    """Queue the remaining tasks that depended on a completed task."""
    dependencies.unblock(task_id, after)


def fail_dependents(task_id: str) -> None:
    """Fail the remaining tasks that depend on a failed task."""
    dependencies.fail_dependents(task_id)


def reblock(task_id: str) -> None:
    """Block the remaining tasks that depend on a reopened task."""
    dependencies.reblock(task_id)


def cancel_children(task_id: str, outcomes: Outcomes) -> None:
    """Cancel the remaining children of a cancelled task."""
    dependencies.each_child(task_id, lambda child: outcomes.cancel(child, kind="parent", reason="parent cancelled"))


def cancel_leased(reason: str, before: str, fleet: Leases) -> None:
    """Cancel the remaining runs that were leased when the kill switch was engaged."""
    fleet.cancel_leased(reason=reason, before=before)


def forget_person(event: LoggedEvent) -> None:
    """Cancel the open tasks of a person whose account was purged."""
    enqueue("tasks.cancel_of", user_id=event.object_id)


def cancel_of(user_id: str, fleet: Leases) -> None:
    """Cancel the open tasks of a purged person, in batches."""
    if fleet.cancel_of(user_id):
        enqueue("tasks.cancel_of", user_id=user_id)


JOBS = (
    Job("tasks.cancel_of", cancel_of),
    Job("tasks.cancel_leased", cancel_leased),
    Job("tasks.purge", purge),
    Job("tasks.unblock", unblock),
    Job("tasks.fail_dependents", fail_dependents),
    Job("tasks.reblock", reblock),
    Job("tasks.cancel_children", cancel_children),
)
SCHEDULES = (
    Schedule("tasks.reap", 5, reap),
    Schedule("tasks.watchdog", 15, watchdog),
    Schedule("tasks.announce", 5, announce),
    Schedule("tasks.index", 5, index),
    Schedule("tasks.sweep", 86_400, sweep),
)
