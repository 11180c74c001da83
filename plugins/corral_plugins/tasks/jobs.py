"""Background work of tasks. Each unit is short: what was found is judged again, one task a unit."""

from __future__ import annotations

import logging
from collections.abc import Callable

from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral.errors import Problem
from corral.events.log import Record
from corral.jobs.job import Job, Schedule, enqueue
from corral_plugins.tasks.service import marks, search
from corral_plugins.tasks.service.clockwork import AT_ONCE, Clockwork
from corral_plugins.tasks.service.fleet import Fleet
from corral_plugins.tasks.service.outcomes import Outcomes
from corral_plugins.tasks.service.relatives import Relatives

log = logging.getLogger("corral.tasks")
ROUNDS = 20
"""At most so many chunks a run; the rest is for the next slot."""


async def reap(work: Work, clockwork: Clockwork) -> None:
    """End what is over."""
    await _one_by_one(work, "job tasks.reap", clockwork.overdue, clockwork.reap)


async def watchdog(work: Work, clockwork: Clockwork) -> None:
    """Find runs that do not move."""
    await _one_by_one(work, "job tasks.watchdog", clockwork.idle, clockwork.watch)


async def _one_by_one(work: Work, label: str, find: Callable[[], list[str]], act: Callable[[str], None]) -> None:
    entry = Entry(label=label, actor=SYSTEM)
    for _ in range(ROUNDS):
        found = await work(find, entry=entry, read=True)
        for task_id in found:
            try:
                await work(lambda task_id=task_id: act(task_id), entry=entry)  # type: ignore[misc]  # bound per round
            except Problem:
                log.warning("a task could not be judged now", extra={"task": task_id}, exc_info=True)
        if len(found) < AT_ONCE:
            return


async def announce(work: Work, clockwork: Clockwork) -> None:
    """Make available what is due, raise what waits long, ring for both, and keep the marks of the list."""
    entry = Entry(label="job tasks.announce", actor=SYSTEM)
    for step in (clockwork.unpark, clockwork.unhold, clockwork.age):
        for _ in range(ROUNDS):
            if await work(step, entry=entry) < AT_ONCE:
                break
    for _ in range(ROUNDS * 10):
        if not await work(marks.extend, entry=entry):
            break


async def index(work: Work) -> None:
    """Have the search know what is new."""
    entry = Entry(label="job tasks.index", actor=SYSTEM)
    for _ in range(ROUNDS * 10):
        if not await work(search.extend, entry=entry):
            break


async def sweep(work: Work, clockwork: Clockwork) -> None:
    """Delete what is old."""
    entry = Entry(label="job tasks.sweep", actor=SYSTEM)
    while await work(clockwork.sweep, entry=entry):
        continue


def purge(task_id: str, clockwork: Clockwork) -> None:
    """Delete what hung on a deleted task, in chunks."""
    if clockwork.purge(task_id):
        enqueue("tasks.purge", task_id=task_id)


def unblock(task_id: str, after: str, relatives: Relatives) -> None:
    """The rest of the dependents of a completed task."""
    relatives.unblock(task_id, after)


def fail_dependents(task_id: str, relatives: Relatives) -> None:
    """The rest of the dependents of a failed task."""
    relatives.fail_dependents(task_id)


def reblock(task_id: str, relatives: Relatives) -> None:
    """The rest of the dependents of a reopened task."""
    relatives.reblock(task_id)


def cancel_children(task_id: str, relatives: Relatives, outcomes: Outcomes) -> None:
    """The rest of the children of a cancelled task."""
    relatives.each_child(task_id, lambda child: outcomes.cancel(child, kind="parent", reason="parent cancelled"))


def cancel_leased(reason: str, before: str, fleet: Fleet) -> None:
    """The rest of the runs that the kill switch ends."""
    fleet.cancel_leased(reason=reason, before=before)


def forget_person(event: Record) -> None:
    """Somebody was purged: what they asked for and has not ended is cancelled."""
    enqueue("tasks.cancel_of", user_id=event.object_id)


def cancel_of(user_id: str, fleet: Fleet) -> None:
    """Cancel the open tasks of a purged person, in chunks."""
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
