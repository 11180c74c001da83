"""Timers: sweeps that end overdue leases, timeouts and deadlines, and that move waiting tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import peewee
from peewee import SQL

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral.errors import NotFound
from corral_core.accounts.api import Accounts
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.events import TaskDeleted, TaskUpdated
from corral_plugins.tasks.models import Attempt, Comment, HourlyRollup, LogLine, Task, WorkerSignal
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.actions import Actions, remove
from corral_plugins.tasks.service.outcomes import Outcomes
from corral_plugins.tasks.service.rows import TaskRow
from corral_plugins.tasks.service.runs import Runs
from corral_plugins.tasks.service.transitions import TOP_RANK, Transitions, aging_steps, publish

BATCH_SIZE, USER_BATCH_SIZE = 500, 100
DAY = 86_400

Found = list[tuple[str, str]]


class Timers:
    """Joins the caller's unit. Finders return ids; what they found is judged again under the lock, one task a unit."""

    def __init__(
        self, transitions: Transitions, outcomes: Outcomes, leases: Runs, actions: Actions, accounts: Accounts
    ) -> None:
        self._transitions, self._outcomes, self._leases = transitions, outcomes, leases
        self._actions, self._accounts, self._settings = actions, accounts, transitions.settings

    # -- what is over

    def overdue(self) -> list[str]:
        """Ids of tasks whose lease, acknowledgement, grace, timeout, deadline, queue time or question is over."""
        now = clock.now()
        live = Attempt.finished_at.is_null()
        late = (
            (Attempt.lease_until < now)
            | (Attempt.ack_until < now)
            | (Attempt.cancel_until < now)
            | (Attempt.timeout_at < now)
        )
        found = [row[0] for row in rows.values(Attempt.select(Attempt.task_id).where(live & late).limit(BATCH_SIZE))]
        past = (
            SQL("deadline IS NOT NULL AND finished_at IS NULL") & (Task.deadline < now) & (Task.status != "cancelling")
        )
        waited = SQL("status = 'pending' AND queue_until IS NOT NULL") & (Task.queue_until < now)
        unanswered = SQL("status = 'waiting'") & (Task.waiting_until < now)
        for condition in (past, waited, unanswered):
            found += [row[0] for row in rows.values(Task.select(Task.id).where(condition).limit(BATCH_SIZE))]
        return list(dict.fromkeys(found))

    def reap(self, task_id: str) -> None:
        """Do what is due for one task, if it still is."""
        try:
            row = rows.lock(task_id)
        except NotFound:
            return
        now = clock.now()
        if row.finished_at is not None:
            return
        if row.lease_id is not None:
            self._reap_lease(row, now)
        elif row.deadline is not None and row.deadline < now:
            self._outcomes.fail_final(row, None, "deadline", "deadline", "Its deadline has passed.", by="deadline")
        elif row.status == "waiting" and (row.waiting_until or now) < now:
            self._actions.expire_input(row)
        elif row.status == "pending" and row.queue_until is not None and row.queue_until < now:
            told = f"No worker took it within {row.queue_timeout_seconds} seconds."
            self._outcomes.fail_final(row, None, "queue_timeout", "queue_timeout", told, by="queue_timeout")

    def _reap_lease(self, row: TaskRow, now: str) -> None:
        attempt = rows.live(row.id)
        if attempt is None:
            return
        is_lost = attempt.lease_until < now
        if row.status == "cancelling":
            if is_lost or (attempt.cancel_until is not None and attempt.cancel_until < now):
                self._outcomes.settle(row, attempt, by="reaper")
                self._transitions.signal(attempt, "lost")
        elif row.status == "assigned" and (is_lost or (attempt.ack_until or now) < now):
            self._outcomes.requeue(row, attempt, attempt_status="lost", by="reaper")
            self._transitions.signal(attempt, "lost")
        elif is_lost:
            told = "The worker gave no sign of life until its lease ended."
            self._outcomes.fail(row, attempt, "lease_lost", "lease_lost", told, by="reaper")
            self._transitions.signal(attempt, "lost")
        elif row.deadline is not None and row.deadline < now:
            self._outcomes.stop(row, kind="deadline", reason=None)
        elif attempt.timeout_at is not None and attempt.timeout_at < now:
            self._outcomes.stop(row, kind="timeout", reason=None)

    # -- what does not move

    def idle(self) -> list[str]:
        """Ids of tasks that run without activity for too long; each is judged again under its lock."""
        live = Attempt.finished_at.is_null() & (Attempt.status == "running") & (Attempt.stalled == False)  # noqa: E712
        shortest = clock.now(-1)
        found = (
            Attempt.select(Attempt.task_id, Attempt.last_activity_at, Attempt.stall_seconds)
            .where(live & (Attempt.stall_seconds > 0) & (Attempt.last_activity_at < shortest))
            .limit(10_000)
        )
        now = clock.time_s()
        return [
            task_id for task_id, since, seconds in rows.values(found) if clock.parse_instant(since) + seconds <= now
        ]

    def watch(self, task_id: str) -> None:
        """Call a run stalled, once, if it is."""
        try:
            row = rows.lock(task_id)
        except NotFound:
            return
        attempt = rows.live(task_id)
        if attempt is None or row.status != "running" or attempt.stalled:
            return
        if clock.parse_instant(attempt.last_activity_at) + attempt.stall_seconds > clock.time_s():
            return
        rows.change_attempt(attempt, stalled=True)
        self._leases.stalled(row, attempt, "idle")

    # -- what waits

    def next_due(self) -> str | None:
        """When the next parked task becomes available."""
        parked = SQL("status = 'pending' AND queue IS NULL")
        found = Task.select(peewee.fn.MIN(Task.available_at)).where(parked).tuples().first()
        return found[0] if found else None

    def unpark(self) -> int:
        """Put what has become available into its queue, at most 500; how many."""
        aging = self._settings.get(declared.AGING_SECONDS)
        due = SQL("status = 'pending' AND queue IS NULL") & (Task.available_at <= clock.now())
        found = rows.tasks(due, BATCH_SIZE)
        if found:
            self._set_queue([row.id for row in found], queue=Task.queue_key, rank_at=clock.now(aging))
            for row in found[:1]:  # one ring of the bell wakes every waiting claim
                publish(TaskUpdated, row, row.status)
        return len(found)

    def unhold(self) -> int:
        """Let go what was held because its requester was not active, at most 500; how many."""
        held = SQL("status = 'pending' AND queue = 'held'")
        people = Task.select(Task.created_by).where(held).distinct().order_by(Task.created_by).limit(USER_BATCH_SIZE)
        some = [user for (user,) in rows.values(people)]
        while some:
            active = [user.id for user in self._accounts.get_many(some).values() if user.is_active]
            if active:
                found = rows.tasks(held & Task.created_by.in_(active), BATCH_SIZE)
                self._set_queue([row.id for row in found], queue=Task.queue_key)
                for row in found[:1]:
                    publish(TaskUpdated, row, row.status)
                return len(found)
            some = [user for (user,) in rows.values(people.where(Task.created_by > some[-1]))]
        return 0

    def age(self) -> int:
        """Raise by one rank for each `tasks.aging_seconds` what has waited another of them, at most 500; how many."""
        aging = self._settings.get(declared.AGING_SECONDS)
        if not aging:
            return 0
        due = SQL("status = 'pending' AND rank_at IS NOT NULL") & (Task.rank_at <= clock.now())
        columns = (Task.id, Task.priority, Task.queued_at)
        found = rows.values(Task.select(*columns).where(due).order_by(Task.rank_at).limit(BATCH_SIZE))
        risen: dict[int, list[str]] = {}
        at_top: list[str] = []
        for task_id, priority, queued_at in found:
            steps = aging_steps(queued_at, aging)
            (at_top if priority + steps >= TOP_RANK else risen.setdefault(steps, [])).append(task_id)
        for steps, ids in risen.items():
            self._set_queue(ids, rank=Task.priority + steps, rank_at=clock.now(aging))
        self._set_queue(at_top, rank=TOP_RANK, rank_at=None)
        return len(found)

    @staticmethod
    def _set_queue(ids: list[str], **columns: Any) -> None:
        """Change the columns of the queue, which no client sees, of tasks that are still pending."""
        if ids:
            Task.update(**columns).where(Task.id.in_(sorted(ids)) & (Task.status == "pending")).execute()

    # -- what is old

    def sweep(self) -> int:
        """Delete what `tasks.retention_days` does not keep, and old signals and sums, at most 500 rows each."""
        gone = 0
        days = self._settings.get(declared.RETENTION_DAYS)
        if days is not None:
            old = SQL("finished_at IS NOT NULL") & (Task.finished_at < clock.now(-days * DAY))
            found = rows.tasks(old, 100)
            for row in found:
                remove(row)
                publish(TaskDeleted, row, row.status)
            gone += len(found)
        for model, column, before in (
            (WorkerSignal, WorkerSignal.created_at, clock.now(-DAY)),
            (HourlyRollup, HourlyRollup.hour, clock.now(-400 * DAY)[:13]),
        ):
            key: Any = model._meta.primary_key
            if isinstance(key, peewee.CompositeKey):
                gone += model.delete().where(column < before).execute()
            else:
                some = model.select(key).where(column < before).limit(BATCH_SIZE)
                gone += model.delete().where(key.in_(some)).execute()
        return gone

    @staticmethod
    def purge(task_id: str) -> int:
        """Delete what hung on a deleted task, at most 500 rows of each kind; how many."""
        gone = 0
        for model in (LogLine, Comment, Attempt):
            some = model.select(model.id).where(model.task_id == task_id).limit(BATCH_SIZE)
            gone += model.delete().where(model.id.in_(some)).execute()
        return gone


LOOK_EVERY = 0.5
ENTRY = Entry(label="tasks alarm", actor=SYSTEM)


class DueTaskNotifier:
    """Looks twice a second for the next due task: one look into an index."""

    def __init__(self, work: Work, timers: Timers) -> None:
        self._work, self._clockwork = work, timers

    async def run(self) -> None:
        """For ever; supervised by the kernel."""
        while True:
            due = await self._work(self._clockwork.next_due, entry=ENTRY, read=True)
            while (
                due is not None
                and due <= clock.now()
                and await self._work(self._clockwork.unpark, entry=ENTRY) == BATCH_SIZE
            ):
                continue
            await asyncio.sleep(LOOK_EVERY)
