"""How attempts and tasks end: completed, failed or tried again, cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corral import clock
from corral.schema.data import json_schema_problems
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.events import TaskCancelled, TaskCompleted, TaskEvent, TaskFailed, TaskRetried, TaskUpdated
from corral_plugins.tasks.models import TERMINAL
from corral_plugins.tasks.service import rollups, rows
from corral_plugins.tasks.service.dependencies import Dependencies
from corral_plugins.tasks.service.rows import AttemptRow, TaskRow
from corral_plugins.tasks.service.transitions import NOT_CANCELLED, Transitions, failure, summary, transition
from corral_plugins.tools.api import Tools

RETRYABLE = ("error", "timeout", "lease_lost", "stalled")
NOT_WAITING: dict[str, Any] = {"waiting_for": None, "waiting_kind": None, "waiting_until": None}
ENDED = {
    "timeout": "It ran longer than its timeout_seconds.",
    "stalled": "It made no progress.",
    "deadline": "Its deadline has passed.",
    "budget": "Its budget is used up.",
}


class Outcomes:
    """Ends of attempts and tasks. Every method takes a locked row."""

    tools: Tools | None

    def __init__(self, transitions: Transitions, dependencies: Dependencies) -> None:
        self._transitions, self._dependencies = transitions, dependencies
        self._settings, self._agents = transitions.settings, transitions.agents

    # -- completed

    def complete(
        self, row: TaskRow, attempt: AttemptRow | None, *, result: str | None, artifacts: Sequence[Any] | None, by: str
    ) -> None:
        """A result (JSON text) is there. One that does not fit `output_schema` is a failure that may be retried."""
        if row.output_schema is not None and attempt is not None:
            faults = json_schema_problems(rows.parsed(row.output_schema), rows.parsed(result))
            if faults and row.status == "cancelling":  # it came late and does not count: the cancellation does
                self.settle(row, attempt, by=by, kept=result)
                return
            if faults:
                told = "; ".join(f"{fault.pointer or '/'}: {fault.detail}" for fault in faults[:5])
                self.fail(
                    row, attempt, "error", "schema_mismatch", f"The result does not fit output_schema: {told}", by=by
                )
                return
        now = clock.now()
        duration = None if row.started_at is None else clock.elapsed_ms(row.started_at, now)
        changes: dict[str, Any] = {"result": result, "error": None, "finished_at": now, **NOT_WAITING}
        if row.status == "cancelling":
            changes |= NOT_CANCELLED
        if artifacts is not None:
            changes["artifacts"] = list(artifacts)
        named = {"result_summary": summary(result), "duration_ms": duration, "cost_usd": row.cost_micro / 1e6}
        self._end(row, attempt, "completed", by=by, event=TaskCompleted, named=named, lost_in_row=0, **changes)
        if attempt is not None:
            self._agents.attempt_ended(attempt.agent_id, configuration_failure=False)
        rollups.count_end(completed=True, duration_ms=duration)
        self._transitions.metrics.completed(duration)
        self._dependencies.unblock(row.id)

    # -- failed

    def fail(
        self, row: TaskRow, attempt: AttemptRow, kind: str, type_: str, message: str, *, retryable: bool = True, by: str
    ) -> None:
        """An attempt failed: tried again if the policy says so, else the task fails for good."""
        error = failure(kind, type_, message, retryable=retryable, attempt=row.attempt)
        lost = row.lost_in_row + 1 if kind == "lease_lost" else 0
        if lost >= self._settings.get(declared.CRASH_LIMIT):
            told = f"{lost} attempts in a row were lost with their worker."
            error = failure(kind, "crash_loop", told, retryable=False, attempt=row.attempt)
        elif retryable and (delay := self._delay(row, kind, type_)) is not None:
            self._again(row, attempt, error, delay, lost, by)
            self._count_failure(attempt, type_, retryable=retryable)
            return
        self._fail_for_good(row, attempt, error, by=by, lost_in_row=lost)
        self._count_failure(attempt, type_, retryable=retryable)

    def _count_failure(self, attempt: AttemptRow, type_: str, *, retryable: bool) -> None:
        """Failures of the provider that repeating cannot cure count against the agent."""
        is_configuration = type_.startswith("provider_error") and not retryable
        self._agents.attempt_ended(attempt.agent_id, configuration_failure=is_configuration)

    def _delay(self, row: TaskRow, kind: str, type_: str) -> float | None:
        """Seconds until the next attempt; None: there is none. A lost lease has cost enough time already."""
        agent = None
        if row.retry_policy is None and row.assigned_agent_id is not None:
            agent = self._agents.facts(row.assigned_agent_id)
        policy = declared.retry_policy(self._settings, row.retry_policy, agent.retry_policy if agent else None)
        if kind not in RETRYABLE or kind not in policy.retry_on or type_ in policy.non_retryable_types:
            return None
        if row.attempt >= policy.max_attempts:
            return None
        return 0.0 if kind == "lease_lost" else declared.delay_seconds(policy, max(1, row.attempt))

    def _again(
        self, row: TaskRow, attempt: AttemptRow, error: dict[str, Any], delay: float, lost: int, by: str
    ) -> None:
        columns = self._transitions.queued(row, delay_seconds=delay)
        named = {"source": "policy", "reason": error["type"], "available_at": columns["available_at"]}
        self._end(
            row,
            attempt,
            "pending",
            by=by,
            event=TaskRetried,
            named=named,
            cause=error,
            error=error,
            lost_in_row=lost,
            progress=None,
            resuming=False,
            **columns,
            **NOT_CANCELLED,
        )

    def fail_final(
        self, row: TaskRow, attempt: AttemptRow | None, kind: str, type_: str, message: str, *, by: str
    ) -> None:
        """The task fails for good: deadline, queue timeout, budget, or because its owner says so."""
        error = failure(kind, type_, message, retryable=False, attempt=row.attempt)
        self._fail_for_good(row, attempt, error, by=by)

    def _fail_for_good(
        self, row: TaskRow, attempt: AttemptRow | None, error: dict[str, Any], *, by: str, **more: Any
    ) -> None:
        changes = {"error": error, "finished_at": clock.now(), **NOT_WAITING, **more}
        self._end(row, attempt, "failed", by=by, event=TaskFailed, named={"error": error}, cause=error, **changes)
        rollups.count_end(completed=False, duration_ms=None)
        self._dependencies.fail_dependents(row.id)

    # -- cancelled

    def cancel(self, row: TaskRow, *, kind: str, reason: str | None) -> None:
        """End what does not run; ask the worker of what runs. A person's wish outranks the server's own reasons."""
        if row.status not in ("assigned", "running", "cancelling"):
            self.cancelled(row, None, kind=kind, reason=reason, by=kind)
            return
        if row.status != "cancelling":
            self.stop(row, kind=kind, reason=reason)
        elif row.cancel_kind not in ("user", kind):
            rows.change(row, {"cancel_kind": kind, "cancel_reason": reason})
        self._cancel_children(row, kind)

    def _cancel_children(self, row: TaskRow, kind: str) -> None:
        """When it is asked to end and again when it has ended: until then a run may still have made children."""
        if kind in rows.FOR_GOOD:
            self._dependencies.each_child(
                row.id, lambda child: self.cancel(child, kind="parent", reason="parent cancelled")
            )

    def stop(self, row: TaskRow, *, kind: str, reason: str | None) -> None:
        """Ask the worker to end a run; it has `tasks.cancel_grace_seconds`."""
        attempt = rows.live(row.id)
        now = clock.now()
        changes: dict[str, Any] = {"cancel_kind": kind, "cancel_reason": reason, "cancel_requested_at": now}
        transition(row, "cancelling", event=TaskUpdated, **changes)
        if attempt is not None:
            rows.change_attempt(attempt, cancel_until=clock.now(self._settings.get(declared.CANCEL_GRACE)))
            self._transitions.signal(attempt, "cancel_requested")

    def settle(self, row: TaskRow, attempt: AttemptRow, *, by: str, kept: str | None = None) -> None:
        """A `cancelling` task has heard it, ended, lost its lease, or had its grace. `kept`: a result too late."""
        kind = row.cancel_kind or "user"
        told = row.cancel_reason or ENDED.get(kind, "")
        if kind in rows.FOR_GOOD:
            self.cancelled(row, attempt, kind=kind, reason=row.cancel_reason, by=by, kept=kept)
        elif kind in ("timeout", "stalled"):
            retryable = kind == "timeout" or attempt.stall_action == "retry"
            self.fail(row, attempt, kind, kind, told, retryable=retryable, by=by)
        else:
            self.fail_final(row, attempt, kind, kind, told, by=by)

    def cancelled(
        self,
        row: TaskRow,
        attempt: AttemptRow | None,
        *,
        kind: str,
        reason: str | None,
        by: str,
        kept: str | None = None,
    ) -> None:
        """The task ends as cancelled."""
        now = clock.now()
        changes: dict[str, Any] = {"finished_at": now, "cancel_kind": kind, "cancel_reason": reason, **NOT_WAITING}
        if row.status != "cancelling":
            changes["cancel_requested_at"] = now
        elif row.cancel_requested_at is not None:
            self._transitions.metrics.cancelled(clock.elapsed_ms(row.cancel_requested_at, now))
        self._end(row, attempt, "cancelled", by=by, event=TaskCancelled, named={"reason": reason}, kept=kept, **changes)
        self._dependencies.fail_dependents(row.id)
        self._cancel_children(row, kind)

    def requeue(self, row: TaskRow, attempt: AttemptRow, *, attempt_status: str, by: str, **changes: Any) -> None:
        """Back to the queue without using an attempt; the checkpoint stays."""
        if attempt.counted:
            attempt.counted = False
            changes["attempt"] = row.attempt - 1
        elif attempt.resumed or row.resuming:
            changes["resuming"] = True
        columns = {**self._transitions.queued(row), **changes, **NOT_CANCELLED, "progress": None}
        self._transitions.end_lease(row, attempt, "pending", attempt_status=attempt_status, by=by, **columns)

    def _unanswered(self, row: TaskRow) -> None:
        """What a tool asked a person is not asked any more."""
        call_id = (rows.parsed(row.waiting_for) or {}).get("call_id")
        if call_id is not None and self.tools is not None:
            error = {"type": "expired", "message": "The task ended before anybody answered."}
            self.tools.answered(row.id, call_id, error=error)

    def _end(
        self,
        row: TaskRow,
        attempt: AttemptRow | None,
        to: str,
        /,
        *,
        by: str,
        event: type[TaskEvent],
        named: dict[str, Any],
        cause: dict[str, Any] | None = None,
        kept: str | None = None,
        **changes: Any,
    ) -> None:
        """A transition with or without a live lease."""
        if row.status == "waiting":
            self._unanswered(row)
        if attempt is None:
            transition(row, to, event=event, named=named, **changes)
            return
        attempt_status = to if to in TERMINAL else "failed"
        self._transitions.end_lease(
            row,
            attempt,
            to,
            attempt_status=attempt_status,
            by=by,
            event=event,
            named=named,
            cause=cause,
            kept=kept,
            **changes,
        )
