"""Ends attempts and tasks, and updates the dependents and children of a task that ended or is retried.

Rows are locked before they are checked, so that no update is lost if two tasks end at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corral import clock
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.jobs.job import enqueue
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.approvals.api import Approvals
from corral_plugins.code_reviews.api import CodeReviews
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import TaskCancelled, TaskCompleted, TaskEvent, TaskFailed, TaskRetried, TaskUpdated
from corral_plugins.tasks.models import STATUSES, TERMINAL, AttemptRow, Dependency, Task, TaskRow
from corral_plugins.tasks.service import rows, statistics
from corral_plugins.tasks.service.dead_letters import TaskDeadLetters
from corral_plugins.tasks.service.rows import TASK_COLUMNS
from corral_plugins.tasks.service.transitions import (
    NOT_CANCELLED,
    NOT_WAITING,
    TaskTransitions,
    publish_task_event,
    requeue_columns,
    result_summary,
    task_error,
    transition,
)
from corral_plugins.tools.api import Tools

BATCH_SIZE = 200
"""The maximum number of dependents or children that one unit of work handles. A background job handles the rest."""


def _status_is(status: str) -> Any:
    """Return the SQL condition for tasks with this status.

    The condition is written as a negation so that the database does not use the index on the status. A task has few
    dependents, so finding them by their ids is faster.
    """
    return Task.status.not_in([each for each in STATUSES if each != status])


_DEPENDENTS = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where(
            _status_is("blocked")
            & (Task.id > p("after"))
            & Task.id.in_(Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")))
        )
        .order_by(Task.id)
        .limit(BATCH_SIZE)
    ).tuples()
)
_FAILED_BY = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where(
            _status_is("failed")
            & (Task.failed_dependency_id == p("id"))
            & Task.id.in_(Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")))
        )
        .order_by(Task.id)
        .limit(BATCH_SIZE)
    ).tuples()
)
_HAS_DEPENDENTS = Statement(
    lambda p: Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")).limit(1).tuples()
)
_CHILDREN = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where((Task.parent_task_id == p("id")) & rows.CAN_CONTINUE)
        .order_by(Task.id)
        .limit(BATCH_SIZE)
    ).tuples()
)
_OPEN_DEPENDENCY = Statement(
    lambda p: (
        Dependency.select(Dependency.task_id)
        .join(Task, on=(Task.id == Dependency.needs_id))
        .where((Dependency.task_id == p("id")) & (Task.status != "completed"))
        .limit(1)
        .tuples()
    )
)
_DEAD_DEPENDENCY = Statement(
    lambda p: (
        Dependency.select(Dependency.needs_id)
        .join(Task, on=(Task.id == Dependency.needs_id))
        .where((Dependency.task_id == p("id")) & Task.status.in_(("failed", "cancelled")))
        .order_by(Dependency.needs_id)
        .limit(1)
        .tuples()
    )
)


def unblock_dependents(task_id: str, after: str = "") -> None:
    """Queue the tasks that depend on a completed task and have no other open dependency.

    `after` is the id of the last dependent that has already been checked.
    """
    if _HAS_DEPENDENTS.one({"id": task_id}) is None:
        return
    found = [TaskRow(*row) for row in _DEPENDENTS.rows({"id": task_id, "after": after})]
    for dependent in found:
        if _OPEN_DEPENDENCY.one({"id": dependent.id}) is None:
            available = max(dependent.available_at, clock.now())
            transition(dependent, "pending", **requeue_columns(dependent, available_at=available))
    if len(found) == BATCH_SIZE:
        enqueue("tasks.unblock", task_id=task_id, after=found[-1].id)


def fail_dependents(task_id: str) -> None:
    """Fail the tasks that depend on a failed or cancelled task, directly or indirectly."""
    waiting, failed = [task_id], 0
    while waiting:
        needed = waiting.pop()
        if _HAS_DEPENDENTS.one({"id": needed}) is None:
            continue
        for row in _DEPENDENTS.rows({"id": needed, "after": ""}):
            dependent, error = TaskRow(*row), _dependency_failed_error(needed)
            transition(
                dependent,
                "failed",
                event=TaskFailed,
                fields={"error": error},
                error=error,
                finished_at=clock.now(),
                failed_dependency_id=needed,
            )
            statistics.count_ended_task(completed=False, duration_ms=None)
            waiting.append(dependent.id)
            failed += 1
        if failed >= BATCH_SIZE:
            for rest in [needed, *waiting]:
                enqueue("tasks.fail_dependents", task_id=rest)
            return


def reblock_dependents(task_id: str) -> None:
    """Block the tasks that failed only because of a task that is now being retried.

    Their own dependents that failed for the same reason are also blocked again.
    """
    waiting, count = [task_id], 0
    while waiting:
        needed = waiting.pop()
        if _HAS_DEPENDENTS.one({"id": needed}) is None:
            continue
        for row in _FAILED_BY.rows({"id": needed}):
            dependent, count = TaskRow(*row), count + 1
            dead = _DEAD_DEPENDENCY.one({"id": dependent.id})
            if dead is not None:  # another dependency is dead, so the task stays failed because of that one
                rows.change_task(
                    dependent, {"failed_dependency_id": dead[0], "error": _dependency_failed_error(dead[0])}
                )
                publish_task_event(TaskUpdated, dependent, dependent.status)
                continue
            transition(dependent, "blocked", error=None, finished_at=None, failed_dependency_id=None)
            waiting.append(dependent.id)
        if count >= BATCH_SIZE:
            for rest in [needed, *waiting]:
                enqueue("tasks.reblock", task_id=rest)
            return


def _dependency_failed_error(needed: str) -> dict[str, Any]:
    message = f"The task {needed}, on which this task depends, did not complete."
    return task_error("dependency_failed", "dependency_failed", message, retryable=False, attempt=0)


# -- outcomes


RETRYABLE = ("error", "timeout", "lease_lost", "stalled")
REASONS = {
    "timeout": "The run exceeded its timeout_seconds.",
    "stalled": "The run made no progress.",
    "deadline": "The deadline of the task has passed.",
    "budget": "The budget of the task is used up.",
}


class TaskOutcomes:
    """Ends attempts and tasks. Every method takes a locked row and runs in the caller's unit of work."""

    approvals: Approvals | None
    code_reviews: CodeReviews | None
    tools: Tools | None

    def __init__(self, transitions: TaskTransitions, dead_letters: TaskDeadLetters) -> None:
        self._transitions, self._dead_letters = transitions, dead_letters
        self._settings, self._agents = transitions.settings, transitions.agents

    # -- completed

    def complete(
        self, row: TaskRow, attempt: AttemptRow | None, *, result: str | None, artifacts: Sequence[Any] | None, by: str
    ) -> None:
        """Complete a task with a result (JSON text).

        If the result of a run does not match `output_schema`, the attempt fails and may be retried.
        """
        if attempt is not None and self.end_mismatching(row, attempt, result, by=by):
            return
        now = clock.now()
        duration = None if row.started_at is None else clock.elapsed_ms(row.started_at, now)
        changes: dict[str, Any] = {"result": result, "error": None, "finished_at": now, **NOT_WAITING}
        if row.status == "cancelling":
            changes |= NOT_CANCELLED
        if artifacts is not None:
            changes["artifacts"] = list(artifacts)
        fields = {"result_summary": result_summary(result), "duration_ms": duration, "cost_usd": row.cost_micro / 1e6}
        self._end_attempt(
            row, attempt, "completed", by=by, event=TaskCompleted, fields=fields, lost_in_row=0, **changes
        )
        if attempt is not None:
            self._agents.record_attempt_end(attempt.agent_id, configuration_failure=False, stalled=attempt.stalls > 0)
        statistics.count_ended_task(completed=True, duration_ms=duration)
        self._transitions.metrics.observe_duration(duration)
        unblock_dependents(row.id)

    def end_mismatching(self, row: TaskRow, attempt: AttemptRow, result: str | None, *, by: str) -> bool:
        """End a run whose result does not match `output_schema`. Return False if the result matches."""
        schema = rows.output_schema(row, attempt)
        faults = json_schema_errors(schema, rows.parse_json_text(result)) if schema is not None else ()
        if not faults:
            return False
        if row.status == "cancelling":  # the result came too late; the cancellation prevails
            self.end_cancelling(row, attempt, by=by, late_result=result)
            return True
        message = "; ".join(f"{fault.pointer or '/'}: {fault.detail}" for fault in faults[:5])
        detail = f"The result does not match output_schema: {message}"
        self.fail(row, attempt, "error", "schema_mismatch", detail, by=by)
        return True

    # -- failed

    def fail(
        self, row: TaskRow, attempt: AttemptRow, kind: str, type_: str, message: str, *, retryable: bool = True, by: str
    ) -> None:
        """Fail an attempt.

        If the retry policy allows a retry, the task is retried. Otherwise, or if too many consecutive attempts have
        lost their leases, the task fails permanently.
        """
        error = task_error(kind, type_, message, retryable=retryable, attempt=row.attempt)
        lost = row.get("lost_in_row") + 1 if kind == "lease_lost" else 0
        if lost >= self._settings.get(declared.CRASH_LIMIT):
            message = f"The workers of {lost} consecutive attempts were lost."
            error = task_error(kind, "crash_loop", message, retryable=False, attempt=row.attempt)
        elif retryable and (delay := self._retry_delay(row, kind, type_)) is not None:
            self._retry(row, attempt, error, delay, lost, by)
            self._count_failure(row, attempt, type_, retryable=retryable)
            return
        self._end_failed(row, attempt, error, by=by, lost_in_row=lost)
        self._count_failure(row, attempt, type_, retryable=retryable)

    def _count_failure(self, row: TaskRow, attempt: AttemptRow, type_: str, *, retryable: bool) -> None:
        """Record a failed attempt in the failure statistics of the agent.

        A provider error that a retry cannot fix counts as a configuration failure of the agent.
        """
        is_configuration = type_.startswith("provider_error") and not retryable
        self._agents.record_attempt_end(
            attempt.agent_id,
            configuration_failure=is_configuration,
            stalled=attempt.stalls > 0,
            cause=tuple(row.get("cause_chain")),
        )

    def _retry_delay(self, row: TaskRow, kind: str, type_: str) -> float | None:
        """Return the delay in seconds before the next attempt, or None if there is no further attempt.

        After a lost lease, the task is retried immediately.
        """
        agent = None if row.assigned_agent_id is None else self._agents.find(row.assigned_agent_id)
        policy = declared.retry_policy(self._settings, agent, row.get("retry_policy"))
        if kind not in RETRYABLE or kind not in policy.retry_on or type_ in policy.non_retryable_types:
            return None
        if row.attempt >= policy.max_attempts:
            return None
        return 0.0 if kind == "lease_lost" else declared.delay_seconds(policy, max(1, row.attempt))

    def _retry(
        self, row: TaskRow, attempt: AttemptRow, error: dict[str, Any], delay: float, lost: int, by: str
    ) -> None:
        columns = requeue_columns(row, delay_seconds=delay)
        fields = {"source": "policy", "reason": error["type"], "available_at": columns["available_at"]}
        self._end_attempt(
            row,
            attempt,
            "pending",
            by=by,
            event=TaskRetried,
            fields=fields,
            cause=error,
            error=error,
            lost_in_row=lost,
            progress=None,
            resuming=False,
            **columns,
            **NOT_CANCELLED,
        )

    def fail_permanently(
        self, row: TaskRow, attempt: AttemptRow | None, kind: str, type_: str, message: str, *, by: str
    ) -> None:
        """Fail a task permanently, because of its deadline, queue timeout or budget, or at the request of its owner."""
        error = task_error(kind, type_, message, retryable=False, attempt=row.attempt)
        self._end_failed(row, attempt, error, by=by)

    def _end_failed(
        self, row: TaskRow, attempt: AttemptRow | None, error: dict[str, Any], *, by: str, **more: Any
    ) -> None:
        previous, letter_id = row.status, self._dead_letters.new_letter_id(error)
        changes = {
            "error": error,
            "finished_at": clock.now(),
            "dead_letter_id": letter_id,
            **NOT_WAITING,
            **more,
        }
        self._end_attempt(
            row, attempt, "failed", by=by, event=TaskFailed, fields={"error": error}, cause=error, **changes
        )
        self._dead_letters.add(row, letter_id, previous=previous)
        statistics.count_ended_task(completed=False, duration_ms=None)
        fail_dependents(row.id)

    # -- cancelled

    def cancel(self, row: TaskRow, *, kind: str, reason: str | None) -> None:
        """Cancel a task immediately, or ask its worker to stop the run if the task is leased.

        A later cancellation replaces the kind and reason of an earlier one, unless the earlier one was requested by a
        person.
        """
        if row.status not in ("assigned", "running", "cancelling"):
            self.end_cancelled(row, None, kind=kind, reason=reason, by=kind)
            return
        if row.status != "cancelling":
            self.request_stop(row, kind=kind, reason=reason)
        elif row.cancel_kind not in ("user", kind):
            rows.change_task(row, {"cancel_kind": kind, "cancel_reason": reason})
        if kind in rows.FINAL_CANCELLATIONS:
            self.cancel_children(row.id)

    def cancel_children(self, task_id: str) -> None:
        """Cancel the children of a task.

        If the children do not fit into one batch, a background job cancels the rest.
        """
        found = [TaskRow(*row).id for row in _CHILDREN.rows({"id": task_id})]
        for child_id in found:
            child = rows.lock_task(child_id)  # ending another child may have ended this one
            if rows.is_cancellable(child):
                self.cancel(child, kind="parent", reason="parent cancelled")
        if len(found) == BATCH_SIZE:
            enqueue("tasks.cancel_children", task_id=task_id)

    def request_stop(self, row: TaskRow, *, kind: str, reason: str | None) -> None:
        """Ask the worker to stop a run within `tasks.cancel_grace_seconds`."""
        attempt = rows.find_live_attempt(row.id)
        now = clock.now()
        changes: dict[str, Any] = {"cancel_kind": kind, "cancel_reason": reason, "cancel_requested_at": now}
        transition(row, "cancelling", **changes)
        if attempt is not None:
            rows.change_attempt(attempt, cancel_until=clock.now(self._settings.get(declared.CANCEL_GRACE)))
            self._transitions.send_signal(attempt, "cancel_requested")

    def end_cancelling(self, row: TaskRow, attempt: AttemptRow, *, by: str, late_result: str | None = None) -> None:
        """End the run of a task whose status is `cancelling`.

        The kind of cancellation determines whether the task is cancelled, fails or is retried. This method is called
        when the worker has stopped the run, has lost the lease, or has exceeded the grace period. `late_result` (JSON
        text) is stored on the attempt only.
        """
        kind = row.cancel_kind or "user"
        message = row.get("cancel_reason") or REASONS.get(kind, "")
        if kind in rows.FINAL_CANCELLATIONS:
            self.end_cancelled(row, attempt, kind=kind, reason=row.get("cancel_reason"), by=by, late_result=late_result)
        elif kind in ("timeout", "stalled"):
            retryable = kind == "timeout" or attempt.stall_action == "retry"
            self.fail(row, attempt, kind, kind, message, retryable=retryable, by=by)
        else:
            self.fail_permanently(row, attempt, kind, kind, message, by=by)

    def end_cancelled(
        self,
        row: TaskRow,
        attempt: AttemptRow | None,
        *,
        kind: str,
        reason: str | None,
        by: str,
        late_result: str | None = None,
    ) -> None:
        """End the task, and set its status to `cancelled`."""
        now = clock.now()
        changes: dict[str, Any] = {"finished_at": now, "cancel_kind": kind, "cancel_reason": reason, **NOT_WAITING}
        if row.status != "cancelling":
            changes["cancel_requested_at"] = now
        elif (requested_at := row.get("cancel_requested_at")) is not None:
            self._transitions.metrics.observe_cancel_time(clock.elapsed_ms(requested_at, now))
        self._end_attempt(
            row,
            attempt,
            "cancelled",
            by=by,
            event=TaskCancelled,
            fields={"reason": reason},
            late_result=late_result,
            **changes,
        )
        fail_dependents(row.id)
        if kind in rows.FINAL_CANCELLATIONS:  # again, because the run may have created more children in the meantime
            self.cancel_children(row.id)

    def requeue(
        self,
        row: TaskRow,
        attempt: AttemptRow,
        *,
        attempt_status: str,
        by: str,
        why: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        """Return a task to its queue without consuming an attempt. The checkpoint is kept.

        `why` is the error of the attempt, for example if the attempt ended because a budget was used up.
        """
        if attempt.counted:
            attempt.counted = False
            changes["attempt"] = row.attempt - 1
        elif attempt.resumed or row.get("resuming"):
            changes["resuming"] = True
        columns = {**requeue_columns(row), **changes, **NOT_CANCELLED, "progress": None}
        fields = None if why is None else {"reason": why["message"]}
        self._transitions.end_lease(
            row, attempt, "pending", attempt_status=attempt_status, by=by, cause=why, fields=fields, **columns
        )

    def _withdraw_question(self, row: TaskRow) -> None:
        """Withdraw the question of a task that ended before anyone answered.

        If a tool call asked the question, an error is stored as the result of that call. Otherwise, nothing is changed.
        """
        call_id = (row.get("waiting_for") or {}).get("call_id")
        if call_id is not None and self.tools is not None:
            error = {"type": "expired", "message": "The task ended before anyone answered."}
            self.tools.deliver_result(row.id, call_id, error=error)

    def _end_attempt(
        self,
        row: TaskRow,
        attempt: AttemptRow | None,
        to: str,
        /,
        *,
        by: str,
        event: type[TaskEvent],
        fields: dict[str, Any],
        cause: dict[str, Any] | None = None,
        late_result: str | None = None,
        **changes: Any,
    ) -> None:
        """Perform a transition that ends an attempt, and end the lease of the attempt.

        If `attempt` is None, no lease is live, and only the status of the task changes.
        """
        if row.status == "waiting":
            self._withdraw_question(row)
        if attempt is None:
            transition(row, to, event=event, fields=fields, **changes)
        else:
            self._transitions.end_lease(
                row,
                attempt,
                to,
                attempt_status=to if to in TERMINAL else "failed",
                by=by,
                event=event,
                fields=fields,
                cause=cause,
                late_result=late_result,
                **changes,
            )
        if to in TERMINAL and self.approvals is not None:
            self.approvals.cancel_for(task_id=row.id, reason=f"The task is {to}.")
        if to in TERMINAL and self.code_reviews is not None and (review_id := row.get("review_id")) is not None:
            self.code_reviews.task_ended(review_id, status=to)
