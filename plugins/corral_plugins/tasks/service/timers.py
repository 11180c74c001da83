"""Periodic checks that end overdue leases, runs and tasks, and that queue or promote waiting tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import peewee
from peewee import SQL

from corral import clock
from corral.database.engine import Database
from corral.database.statement import Statement
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import NotFound
from corral_core.accounts.api import Accounts
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import TaskUpdated
from corral_plugins.tasks.models import PRIORITIES, Attempt, Task, TaskRow
from corral_plugins.tasks.service import queries, rows
from corral_plugins.tasks.service.actions import OwnerActions
from corral_plugins.tasks.service.outcomes import TaskOutcomes
from corral_plugins.tasks.service.runs import TaskRuns
from corral_plugins.tasks.service.transitions import TOP_RANK, TaskTransitions, aged_rank, publish_task_event

BATCH_SIZE, USER_BATCH_SIZE = 500, 100
RISING = [(priority, rank) for priority in range(len(PRIORITIES)) for rank in range(priority, TOP_RANK)]
"""The combinations of priority and rank for which the rank of a task can still be raised."""


_DUE_TO_RISE = Statement(
    lambda p: (
        Task.select(Task.id, Task.queued_at)
        .where(rows.QUEUED & (Task.rank == p("rank")) & (Task.priority == p("priority")) & (Task.queued_at <= p("due")))
        .order_by(Task.queued_at)
        .limit(p("limit"))
        .tuples()
    )
)


class TaskTimers:
    """Ends overdue tasks, and queues or promotes waiting tasks. Every method runs in the caller's unit of work.

    The methods that find tasks return ids. Each of these tasks is then locked and checked again in a separate unit of
    work.
    """

    def __init__(
        self,
        transitions: TaskTransitions,
        outcomes: TaskOutcomes,
        runs: TaskRuns,
        actions: OwnerActions,
        accounts: Accounts,
    ) -> None:
        self._transitions, self._outcomes, self._runs = transitions, outcomes, runs
        self._actions, self._accounts, self._settings = actions, accounts, transitions.settings

    # -- overdue tasks

    def find_overdue_tasks(self) -> list[str]:
        """Return the ids of overdue tasks.

        A task is overdue if one of these times has passed: the end of its lease, the time by which the run must start,
        the grace period for stopping the run, the timeout, the deadline, the queue timeout, or the time limit for an
        answer.
        """
        now = clock.now()
        live = Attempt.finished_at.is_null()
        late = (
            (Attempt.lease_until < now)
            | (Attempt.ack_until < now)
            | (Attempt.cancel_until < now)
            | (Attempt.timeout_at < now)
        )
        found = [
            row[0] for row in rows.fetch_tuples(Attempt.select(Attempt.task_id).where(live & late).limit(BATCH_SIZE))
        ]
        past = (
            SQL("deadline_key < '9999' AND finished_at IS NULL")
            & (Task.deadline_key < now)
            & (Task.status != "cancelling")
        )
        waited = SQL("status = 'pending' AND queue_until IS NOT NULL") & (Task.queue_until < now)
        unanswered = SQL("status = 'waiting'") & (Task.waiting_until < now)
        for condition in (past, waited, unanswered):
            found += [row[0] for row in rows.fetch_tuples(Task.select(Task.id).where(condition).limit(BATCH_SIZE))]
        return list(dict.fromkeys(found))

    def end_overdue_task(self, task_id: str) -> None:
        """End an overdue task, its overdue lease, or its overdue wait for an answer.

        The method does nothing if none of these is overdue any more.
        """
        try:
            row = rows.lock_task(task_id)
        except NotFound:
            return
        now = clock.now()
        if row.finished_at is not None:
            return
        if row.lease_id is not None:
            self._end_overdue_lease(row, now)
        elif row.deadline is not None and row.deadline < now:
            self._outcomes.fail_permanently(
                row, None, "deadline", "deadline", "The deadline of the task has passed.", by="deadline"
            )
        elif row.status == "waiting" and (row.waiting_until or now) < now:
            self._actions.expire_input(row)
        elif row.status == "pending" and row.queue_until is not None and row.queue_until < now:
            message = f"No worker claimed the task within {row.get('queue_timeout_seconds')} seconds."
            self._outcomes.fail_permanently(row, None, "queue_timeout", "queue_timeout", message, by="queue_timeout")

    def _end_overdue_lease(self, row: TaskRow, now: str) -> None:
        attempt = rows.find_live_attempt(row.id)
        if attempt is None:
            return
        is_lost = attempt.lease_until < now
        if row.status == "cancelling":
            if is_lost or (attempt.cancel_until is not None and attempt.cancel_until < now):
                self._outcomes.end_cancelling(row, attempt, by="reaper")
                self._transitions.send_signal(attempt, "lost")
        elif row.status == "assigned" and (is_lost or (attempt.ack_until or now) < now):
            self._outcomes.requeue(row, attempt, attempt_status="lost", by="reaper")
            self._transitions.send_signal(attempt, "lost")
        elif is_lost:
            message = "The worker did not renew its lease in time."
            self._outcomes.fail(row, attempt, "lease_lost", "lease_lost", message, by="reaper")
            self._transitions.send_signal(attempt, "lost")
        elif row.deadline is not None and row.deadline < now:
            self._outcomes.request_stop(row, kind="deadline", reason=None)
        elif attempt.timeout_at is not None and attempt.timeout_at < now:
            self._outcomes.request_stop(row, kind="timeout", reason=None)

    # -- stalled runs

    def find_idle_runs(self) -> list[str]:
        """Return the ids of tasks whose run has been inactive for longer than its stall policy allows."""
        live = Attempt.finished_at.is_null() & (Attempt.status == "running") & (Attempt.stalled == False)  # noqa: E712
        shortest = clock.now(-1)
        found = (
            Attempt.select(Attempt.task_id, Attempt.last_activity_at, Attempt.stall_seconds)
            .where(live & (Attempt.stall_seconds > 0) & (Attempt.last_activity_at < shortest))
            .limit(10_000)
        )
        now = clock.time_s()
        return [
            task_id
            for task_id, since, seconds in rows.fetch_tuples(found)
            if clock.parse_instant(since) + seconds <= now
        ]

    def report_idle_run(self, task_id: str) -> None:
        """Report the run of a task as stalled, unless the run is active again or was already reported."""
        try:
            row = rows.lock_task(task_id)
        except NotFound:
            return
        attempt = rows.find_live_attempt(task_id)
        if attempt is None or row.status != "running" or attempt.stalled:
            return
        if clock.parse_instant(attempt.last_activity_at) + attempt.stall_seconds > clock.time_s():
            return
        rows.change_attempt(attempt, stalled=True)
        self._runs.report_stall(row, attempt, "idle")

    # -- waiting tasks

    def has_waiting_work(self) -> bool:
        """Return whether there is a task to queue, a task whose rank must be raised, or a page anchor to add."""
        due = self.next_available_at()
        held = Task.select().where(SQL("status = 'pending' AND queue = 'held'")).limit(1)
        return (
            (due is not None and due <= clock.now())
            or bool(held.exists())
            or bool(self._due_to_rise(limit=1))
            or queries.next_anchor() is not None
        )

    def next_available_at(self) -> str | None:
        """Return the earliest time at which a delayed task becomes available, or None if no task is delayed."""
        parked = SQL("status = 'pending' AND queue IS NULL")
        found = Task.select(peewee.fn.MIN(Task.available_at)).where(parked).tuples().first()
        return found[0] if found else None

    def queue_available_tasks(self) -> int:
        """Queue at most 500 delayed tasks that have become available. Return the number of queued tasks."""
        due = SQL("status = 'pending' AND queue IS NULL") & (Task.available_at <= clock.now())
        found = rows.lock_tasks(due, BATCH_SIZE)
        if found:
            self._set_queue([row.id for row in found], queue=Task.queue_key)
            for row in found[:1]:  # one event wakes every pending claim
                publish_task_event(TaskUpdated, row, row.status)
        return len(found)

    def queue_tasks_of_active_requesters(self) -> int:
        """Queue at most 500 held tasks whose requester is active again. Return the number of queued tasks.

        A task is held while its requester is not active.
        """
        held = SQL("status = 'pending' AND queue = 'held'")
        people = Task.select(Task.created_by).where(held).distinct().order_by(Task.created_by).limit(USER_BATCH_SIZE)
        some = [user for (user,) in rows.fetch_tuples(people)]
        while some:
            active = [user.id for user in self._accounts.get_many(some).values() if user.is_active]
            if active:
                found = rows.lock_tasks(held & Task.created_by.in_(active), BATCH_SIZE)
                self._set_queue([row.id for row in found], queue=Task.queue_key)
                for row in found[:1]:
                    publish_task_event(TaskUpdated, row, row.status)
                return len(found)
            some = [user for (user,) in rows.fetch_tuples(people.where(Task.created_by > some[-1]))]
        return 0

    def raise_ranks(self) -> int:
        """Raise the ranks of at most 500 tasks that have waited for a long time, so that they are claimed earlier.

        The rank rises by one for each `tasks.aging_seconds` of waiting. Return the number of tasks whose rank was
        raised.
        """
        risen: dict[int, list[str]] = {}
        found = self._due_to_rise(limit=BATCH_SIZE)
        for task_id, priority, queued_at in found:
            to = aged_rank(self._settings, priority=priority, queued_at=queued_at)
            risen.setdefault(to, []).append(task_id)
        for rank, ids in risen.items():
            self._set_queue(ids, rank=rank)
        return len(found)

    def _due_to_rise(self, *, limit: int) -> list[tuple[str, int, str]]:
        """Return at most `limit` tasks whose rank must be raised, as tuples `(id, priority, queued_at)`."""
        aging = self._settings.get(declared.AGING_SECONDS)
        found: list[tuple[str, int, str]] = []
        for priority, rank in RISING if aging else ():
            if len(found) >= limit:
                break
            due = clock.now(-aging * (rank - priority + 1))
            which = {"rank": rank, "priority": priority, "due": due, "limit": limit - len(found)}
            found += [(task_id, priority, queued_at) for task_id, queued_at in _DUE_TO_RISE.rows(which)]
        return found

    @staticmethod
    def _set_queue(ids: list[str], **columns: Any) -> None:
        """Set the queue or the rank of tasks. Tasks that are no longer pending stay unchanged.

        The version of a task stays the same, because clients cannot see these columns.
        """
        if ids:
            Task.update(**columns).where(Task.id.in_(sorted(ids)) & (Task.status == "pending")).execute()


POLL_SECONDS = 0.5
ENTRY = UnitContext(label="tasks: due tasks", actor=SYSTEM)


class DueTaskNotifier:
    """Queues delayed tasks as soon as they become available, which wakes the claims that wait for tasks.

    Polling the database takes two index lookups per second. If this service fails, the scheduled job `tasks.announce`
    queues the tasks. It runs every 5 seconds.
    """

    def __init__(self, database: Database, timers: TaskTimers) -> None:
        self._database, self._timers = database, timers

    async def run(self) -> None:
        """Poll until cancelled. If this method fails, the kernel restarts it."""
        while True:
            due = await self._database.read(self._timers.next_available_at, ENTRY)
            while (
                due is not None
                and due <= clock.now()
                and await self._database.work(self._timers.queue_available_tasks, entry=ENTRY) == BATCH_SIZE
            ):
                continue
            await asyncio.sleep(POLL_SECONDS)
