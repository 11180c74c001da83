"""Renews and revokes leases, reads workers' signals, and creates the principals that act under a lease."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from corral import clock
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Forbidden, Unauthorized
from corral.jobs.job import enqueue
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_plugins.tasks.api import (
    LeaseFacts,
    LeaseRef,
    LeaseSignal,
    LeaseState,
    LeaseView,
    LiveAttempt,
    QueueStatistics,
)
from corral_plugins.tasks.models import Attempt, AttemptRow, Task, TaskRow, WorkerSignal
from corral_plugins.tasks.service import queries, rows, statistics
from corral_plugins.tasks.service.claims import TOKEN_PREFIX, hash_token
from corral_plugins.tasks.service.outcomes import TaskOutcomes
from corral_plugins.tasks.service.rows import lease_lost_error
from corral_plugins.tasks.service.transitions import TaskTransitions

SIGNALS = 200
CANCEL_BATCH_SIZE = 200

_RENEW = Statement(
    lambda p: (
        Attempt.update({Attempt.lease_until: p("until")})
        .where((Attempt.lease_id == p("lease")) & (Attempt.worker_id == p("worker")) & Attempt.finished_at.is_null())
        .returning(Attempt.task_id, Attempt.cancel_until, Attempt.cost_micro, Attempt.cost_warning_micro)
    )
)
_RENEW_ONE = Statement(
    lambda p: Attempt.update(
        {Attempt.lease_until: p("until"), Attempt.last_activity_at: p("now"), Attempt.stalled: False}
    ).where((Attempt.lease_id == p("lease")) & (Attempt.task_id == p("task")) & Attempt.finished_at.is_null())
)
_LIVE_LEASE = Statement(
    lambda p: (
        Attempt.select(Attempt.task_id, Attempt.lease_id, Attempt.agent_id, Attempt.created_at, Attempt.lease_until)
        .where((Attempt.lease_id == p("lease")) & (Attempt.task_id == p("task")) & Attempt.finished_at.is_null())
        .tuples()
    )
)
_LIVE_ATTEMPT = Statement(
    lambda p: (
        Attempt.select(Attempt.id, Attempt.lease_until, Attempt.cost_limit_micro, Attempt.cost_micro)
        .where((Attempt.lease_id == p("lease")) & (Attempt.task_id == p("task")) & Attempt.finished_at.is_null())
        .tuples()
    )
)
_LEASE_FACTS = Statement(
    lambda p: (
        Attempt.select(
            Attempt.id,
            Attempt.agent_id,
            Attempt.worker_id,
            Attempt.requester_id,
            Attempt.finished_at,
            Task.workflow_run_id,
        )
        .join(Task, on=(Task.id == Attempt.task_id))
        .where((Attempt.lease_id == p("lease")) & (Attempt.task_id == p("task")))
        .tuples()
    )
)
_SIGNALS = Statement(
    lambda p: (
        WorkerSignal.select(WorkerSignal.seq, WorkerSignal.task_id, WorkerSignal.lease_id, WorkerSignal.state)
        .where((WorkerSignal.worker_id == p("worker")) & (WorkerSignal.seq > p("after")))
        .order_by(WorkerSignal.seq)
        .limit(SIGNALS)
        .tuples()
    )
)


class TaskLeases:
    """Renews and revokes leases, and reads signals. Every method runs in the caller's unit of work."""

    def __init__(self, transitions: TaskTransitions, outcomes: TaskOutcomes) -> None:
        self._transitions, self._outcomes = transitions, outcomes

    def renew_leases(self, worker_id: str, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """Renew the given leases that are live, and return the state of every given lease.

        Leases that are not live have the state `lost`. If the run itself ended such a lease, `reason` is the name of
        the call that ended it. If the cancellation of a run was requested, `reason` is the kind of cancellation.
        """
        until = self._transitions.new_lease_expiry()
        states = []
        for lease in sorted(leases, key=lambda each: each.lease_id):
            found = _RENEW.rows({"until": until, "lease": lease.lease_id.lower(), "worker": worker_id})
            if not found or found[0][0] != lease.task_id.lower():
                states.append(_lost_lease_state(lease, worker_id))
                continue
            _, cancel_until, cost, warning = found[0]
            row = rows.find_task(lease.task_id.lower()) if cancel_until is not None else None
            state = "budget_warning" if warning is not None and cost >= warning else "ok"
            states.append(
                LeaseState(
                    task_id=lease.task_id,
                    lease_id=lease.lease_id,
                    state=state if row is None else "cancel_requested",
                    expires_at=until,
                    reason=None if row is None else row.cancel_kind,
                )
            )
        return states

    def lease_states(self, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """Return the state (`ok`, `cancel_requested` or `lost`) of each given lease, without renewing the leases."""
        found = rows.fetch_tuples(
            Attempt.select(Attempt.lease_id, Attempt.task_id, Attempt.cancel_until, Attempt.lease_until).where(
                Attempt.lease_id.in_([lease.lease_id for lease in leases]) & Attempt.finished_at.is_null()
            )
        )
        live = {(row[1], row[0]): ("ok" if row[2] is None else "cancel_requested", row[3]) for row in found}
        states = []
        for lease in leases:
            state, until = live.get((lease.task_id, lease.lease_id), ("lost", None))
            states.append(LeaseState(task_id=lease.task_id, lease_id=lease.lease_id, state=state, expires_at=until))
        return states

    def live_lease(self, task_id: str, lease_id: str) -> LeaseView | None:
        """Return the lease if it is live, else None."""
        found = _LIVE_LEASE.one({"task": task_id, "lease": lease_id})
        return (
            None
            if found is None
            else LeaseView(task_id=found[0], lease_id=found[1], agent_id=found[2], since=found[3], expires_at=found[4])
        )

    def live_attempt(self, task_id: str, lease_id: str) -> LiveAttempt | None:
        """Return the attempt of the lease, or None if the lease is not live."""
        found = _LIVE_ATTEMPT.one({"task": task_id, "lease": lease_id})
        if found is None:
            return None
        attempt_id, until, limit, cost = found
        return LiveAttempt(
            attempt_id=attempt_id, lease_until=until, cost_left_micro=None if limit is None else max(0, limit - cost)
        )

    def lease_facts(self, task_id: str, lease_id: str) -> LeaseFacts | None:
        """Return the facts about a lease of the task, even if the lease has ended.

        Return None if the lease does not exist.
        """
        found = _LEASE_FACTS.one({"task": task_id, "lease": lease_id})
        if found is None:
            return None
        attempt_id, agent_id, worker_id, requester_id, finished_at, run_id = found
        return LeaseFacts(
            task_id=task_id,
            lease_id=lease_id,
            attempt_id=attempt_id,
            agent_id=agent_id,
            worker_id=worker_id,
            requester_id=requester_id,
            is_live=finished_at is None,
            workflow_run_id=run_id,
        )

    def renew_lease(self, task_id: str, lease_id: str) -> None:
        """Renew the lease of a run that has shown activity."""
        _RENEW_ONE.run(
            {"until": self._transitions.new_lease_expiry(), "now": clock.now(), "lease": lease_id, "task": task_id}
        )

    def leases_of_worker(self, worker_id: str) -> list[LeaseView]:
        """Return the live leases of a worker, oldest first."""
        found = (
            Attempt.select(Attempt.task_id, Attempt.lease_id, Attempt.agent_id, Attempt.created_at, Attempt.lease_until)
            .where((Attempt.worker_id == worker_id) & Attempt.finished_at.is_null())
            .order_by(Attempt.created_at)
            .limit(1000)
        )
        return [
            LeaseView(task_id=row[0], lease_id=row[1], agent_id=row[2], since=row[3], expires_at=row[4])
            for row in rows.fetch_tuples(found)
        ]

    def read_signals(self, worker_id: str, *, after: int) -> list[LeaseSignal]:
        """Return the worker's signals whose sequence number is greater than `after`."""
        found = _SIGNALS.rows({"worker": worker_id, "after": after})
        return [LeaseSignal(seq=row[0], task_id=row[1], lease_id=row[2], state=row[3]) for row in found]

    def leased_task_ids(self, agent_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the ids of the tasks with a live lease, grouped by agent."""
        tasks: dict[str, list[str]] = {agent_id: [] for agent_id in agent_ids}
        found = (
            Attempt.select(Attempt.agent_id, Attempt.task_id)
            .where(Attempt.agent_id.in_(list(agent_ids)) & Attempt.finished_at.is_null())
            .order_by(Attempt.created_at)
        )
        for agent_id, task_id in rows.fetch_tuples(found) if agent_ids else ():
            tasks[agent_id].append(task_id)
        return tasks

    def queue_statistics(self) -> QueueStatistics:
        """Return the number of pending tasks and the age of the oldest one."""
        oldest = statistics.oldest_pending()
        return QueueStatistics(
            depth=statistics.count_pending_tasks(),
            oldest_pending_ms=statistics.oldest_pending_ms(),
            oldest_pending_id=oldest[1] if oldest is not None else None,
        )

    # -- revocation

    def release_leases_of_worker(self, worker_id: str, *, reason: str) -> int:
        """End all leases of a worker without consuming an attempt. Return the number of ended leases."""
        return len(self._end_leases(Attempt.worker_id == worker_id, reason, lambda row, attempt: None))

    def release_leases_of_agent(self, agent_id: str, *, cancel: bool, reason: str) -> list[str]:
        """End all leases of an agent, and return the ids of the tasks.

        The tasks are queued again, or cancelled if `cancel` is set.
        """

        def end(row: TaskRow, attempt: AttemptRow) -> None:
            if cancel and rows.is_cancellable(row):
                self._outcomes.end_cancelled(row, attempt, kind="user", reason=reason, by="agent_stopped")

        return self._end_leases(Attempt.agent_id == agent_id, reason, end)

    def after_restore(self, by: Principal) -> None:
        """After a restore, end all leases without consuming an attempt, and rebuild the search index.

        The leases are ended because the original installation continues the runs. The search index is rebuilt because
        backups do not contain it.
        """
        while self._end_leases(Attempt.finished_at.is_null(), "restored", lambda row, attempt: None):
            pass
        queries.rebuild_search_index()

    def cancel_all_leased(self, *, reason: str, before: str | None = None) -> int:
        """Request the cancellation of every run whose task was claimed at or before `before` (default: now).

        Runs whose cancellation was already requested are skipped. One unit of work handles at most 200 runs, and a
        background job handles the rest. Return the total number of runs to cancel.
        """
        before = before or clock.now()
        asked = Attempt.cancel_until.is_null() & (Attempt.created_at <= before)
        n = Attempt.select().where(asked & Attempt.finished_at.is_null()).count()
        for attempt in rows.find_live_attempts(asked, CANCEL_BATCH_SIZE):
            row = rows.lock_task(attempt.task_id)
            if row.lease_id == attempt.lease_id and row.status in ("assigned", "running"):
                self._outcomes.request_stop(row, kind="user", reason=reason)
        if n > CANCEL_BATCH_SIZE:
            enqueue("tasks.cancel_all_leased", reason=reason, before=before)
        return int(n)

    def cancel_tasks_of_user(self, user_id: str) -> bool:
        """Cancel at most 200 open tasks of a purged user. Return True if there may be more."""
        found = [row.id for row in rows.lock_tasks((Task.created_by == user_id) & rows.CAN_CONTINUE, CANCEL_BATCH_SIZE)]
        for task_id in found:
            row = rows.lock_task(task_id)  # ending another task may have ended this one
            if rows.is_cancellable(row):
                self._outcomes.cancel(row, kind="user", reason="The account of the requester was purged.")
        return len(found) == CANCEL_BATCH_SIZE

    def _end_leases(self, which: Any, reason: str, end: Callable[[TaskRow, AttemptRow], None]) -> list[str]:
        """End the leases of at most 1,000 attempts that match the condition `which`, and return the ids of their tasks.

        All these tasks are locked first, in a fixed order.
        """
        live = rows.find_live_attempts(which, 1000)
        for attempt in live:
            rows.lock_task(attempt.task_id)
        released = []
        for attempt in live:
            row = rows.lock_task(attempt.task_id)  # ending another task may have changed this one
            if row.lease_id != attempt.lease_id:  # the lease ended while this unit of work waited for the lock
                continue
            end(row, attempt)
            if row.status == "cancelling":
                self._outcomes.end_cancelling(row, attempt, by=reason)
            elif row.lease_id is not None:
                self._outcomes.requeue(row, attempt, attempt_status="released", by=reason)
            self._transitions.send_signal(attempt, "lost")
            released.append(row.id)
        return released


def _lost_lease_state(lease: LeaseRef, worker_id: str) -> LeaseState:
    attempt = rows.find_attempt(lease.lease_id.lower())
    by = attempt.ended_by if attempt is not None and attempt.worker_id == worker_id else None
    reason = by if by in (*rows.END_REPORTS, rows.ASK_TOOL) else None
    return LeaseState(task_id=lease.task_id, lease_id=lease.lease_id, state="lost", expires_at=None, reason=reason)


_LIVE = Statement(
    lambda p: (
        Attempt.select(Attempt.task_id, Attempt.lease_id, Attempt.agent_id, Attempt.requester_id)
        .where((Attempt.token_hash == p("hash")) & Attempt.finished_at.is_null())
        .tuples()
    )
)
_OF_LEASE = Statement(
    lambda p: (
        Attempt.select(Attempt.task_id, Attempt.lease_id, Attempt.agent_id, Attempt.requester_id, Attempt.worker_id)
        .where((Attempt.lease_id == p("lease")) & Attempt.finished_at.is_null())
        .tuples()
    )
)


class AttemptPrincipals:
    """Creates the principals that act under a lease.

    Such a principal has those permissions of agents that the requester's role also has. It also has the permissions
    that are reserved for agents, which even admins do not have.
    """

    def __init__(self, accounts: Accounts, permissions: Permissions) -> None:
        self._accounts, self._permissions = accounts, permissions

    def for_worker(self, worker: Principal, lease_id: str) -> Principal:
        """Return the principal for a live lease that this worker holds.

        Raise `Conflict` with the code `lease_lost` if the lease is not live, and `Forbidden` if another worker holds
        the lease.
        """
        found = _OF_LEASE.one({"lease": lease_id.lower()})
        if found is None:
            raise lease_lost_error()
        if found[4] != worker.worker_id:
            raise Forbidden("This lease is held by another worker.")
        return self.for_lease(*found[:4])

    def for_lease(self, task_id: str, lease_id: str, agent_id: str, requester_id: str | None) -> Principal:
        """Return the principal that acts under a lease.

        Raise `Unauthorized` if the requester no longer exists or is not active.
        """
        role = self._requester_role(requester_id)
        return Principal(
            kind="agent",
            id=agent_id,
            agent_id=agent_id,
            user_id=requester_id,
            role=role,
            permissions=self._permissions_of_role(role),
            task_id=task_id,
            lease_id=lease_id,
        )

    def _requester_role(self, requester_id: str | None) -> str:
        if requester_id is None:
            return "member"
        try:
            return self._accounts.principal_of(requester_id).role or ""
        except InsufficientRights as error:
            raise Unauthorized(error.detail) from None

    def _permissions_of_role(self, role: str) -> frozenset[str]:
        of_agents = self._permissions.held_by("agent")
        return (of_agents & self._permissions.held_by(role)) | (of_agents - self._permissions.held_by("admin"))


class AttemptTokenAuthenticator:
    """Authenticates attempt tokens (`cra_a…`), and workers that name their lease in the `Corral-Lease` header.

    Implements the interfaces `Authenticator`, `RecheckingAuthenticator` and `Delegation`.
    """

    delegation_header = "Corral-Lease"

    def __init__(self, callers: AttemptPrincipals) -> None:
        self._callers = callers

    def recognises(self, credential: str) -> bool:
        return credential.startswith(TOKEN_PREFIX)

    def authenticate(self, credential: str) -> Principal:
        found = _LIVE.one({"hash": hash_token(credential)})
        if found is None:
            raise Unauthorized("The lease that this token belongs to has ended.")
        return self._callers.for_lease(*found)

    def act_as(self, caller: Principal, named: str) -> Principal:
        return caller if caller.worker_id is None else self._callers.for_worker(caller, named)

    def reread(self, caller: Principal) -> Principal | None:
        if caller.lease_id is None:
            return None
        found = _OF_LEASE.one({"lease": caller.lease_id})
        if found is None:
            raise Unauthorized("The lease that this token belongs to has ended.")
        return self._callers.for_lease(*found[:4])
