"""How attempts and tasks end: completed, failed or tried again, cancelled, and what that means for tasks that depend on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from corral import clock
from corral.database.statement import Statement
from corral.errors import Conflict
from corral.jobs.job import enqueue
from corral.schema import json_schema_problems
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.events import TaskCancelled, TaskCompleted, TaskEvent, TaskFailed, TaskRetried
from corral_plugins.tasks.models import TERMINAL, Dependency, Task
from corral_plugins.tasks.service import rows, tallies
from corral_plugins.tasks.service.moves import NOT_CANCELLED, Moves, failure, move, summary
from corral_plugins.tasks.service.rows import Ledger, Row

RETRYABLE = ("error", "timeout", "lease_lost", "stalled")
DEAD_LETTERED = ("error", "timeout", "lease_lost", "stalled", "deadline", "queue_timeout", "budget")
FAN_OUT = 200
"""So many dependents or children are followed in one unit; the rest by a job."""

_DEPENDENTS = Statement(
    lambda p: rows.locked(
        Task.select(Task.id)
        .where(
            (Task.status == "blocked")
            & Task.id.in_(Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")))
        )
        .order_by(Task.id)
        .limit(FAN_OUT + 1)
    ).tuples()
)
_HAS_DEPENDENTS = Statement(lambda p: Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")).limit(1).tuples())


class Outcomes:
    """Ends of attempts and tasks. Every method takes a locked row."""

    def __init__(self, moves: Moves) -> None:
        self._moves, self._settings, self._agents = moves, moves.settings, moves.agents

    # -- completed

    def complete(
        self, row: Row, attempt: Ledger | None, *, result: str | None, artifacts: Sequence[Any] | None, by: str
    ) -> None:
        """A result is there. One that does not fit `output_schema` is a failure that may be retried."""
        if row.output_schema is not None:
            faults = json_schema_problems(rows.parsed(row.output_schema), rows.parsed(result))
            if faults:
                told = "; ".join(f"{fault.pointer or '/'}: {fault.detail}" for fault in faults[:5])
                self.fail(row, attempt, "error", "schema_mismatch", f"The result does not fit output_schema: {told}", by=by)
                return
        now = clock.now()
        duration = None if row.started_at is None else clock.elapsed_ms(row.started_at, now)
        changes: dict[str, Any] = {"result": result, "error": None, "finished_at": now, "waiting_for": None, "waiting_kind": None}
        if artifacts is not None:
            changes["artifacts"] = list(artifacts)
        named = {"result_summary": summary(result), "duration_ms": duration, "cost_usd": row.cost_micro / 1e6}
        self._end(row, attempt, "completed", by=by, event=TaskCompleted, named=named, **changes)
        if attempt is not None:
            self._agents.attempt_ended(attempt.agent_id, configuration_failure=False)
        tallies.ended(completed=True, duration_ms=duration)
        self.unblock(row.id)

    # -- failed

    def fail(
        self, row: Row, attempt: Ledger | None, kind: str, type_: str, message: str, *, retryable: bool = True, by: str
    ) -> None:
        """An attempt failed: tried again if the policy says so, else the task fails for good."""
        error = failure(kind, type_, message, retryable=retryable, attempt=row.attempt)
        lost = row.lost_in_row + 1 if kind == "lease_lost" else 0
        if attempt is not None and by != "owner":
            is_configuration = type_.startswith("provider_error") and not retryable
            self._agents.attempt_ended(attempt.agent_id, configuration_failure=is_configuration)
        if lost >= self._settings.get(declared.CRASH_LIMIT):
            error = failure(
                kind, "crash_loop", f"{lost} attempts in a row were lost with their worker.", retryable=False, attempt=row.attempt
            )
        elif retryable and (delay := self._delay(row, kind, type_)) is not None:
            self._again(row, attempt, error, delay, lost, by)
            return
        self._fail_for_good(row, attempt, error, by=by, lost_in_row=lost)

    def _delay(self, row: Row, kind: str, type_: str) -> float | None:
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
        self, row: Row, attempt: Ledger | None, error: dict[str, Any], delay: float, lost: int, by: str
    ) -> None:
        columns = self._moves.queued(row, delay_seconds=delay)
        named = {"source": "policy", "reason": error["type"], "available_at": columns["available_at"]}
        changes = {**columns, **NOT_CANCELLED, "error": error, "lost_in_row": lost, "progress": None, "resuming": False}
        self._end(row, attempt, "pending", by=by, event=TaskRetried, named=named, error=error, **changes)

    def _fail_for_good(
        self, row: Row, attempt: Ledger | None, error: dict[str, Any], *, by: str, **changes: Any
    ) -> None:
        ended = {"error": error, "finished_at": clock.now(), "waiting_for": None, "waiting_kind": None, **changes}
        self._end(row, attempt, "failed", by=by, event=TaskFailed, named={"error": error}, error=error, **ended)
        tallies.ended(completed=False, duration_ms=None)
        self.fail_dependents(row.id)

    def fail_final(self, row: Row, attempt: Ledger | None, kind: str, type_: str, message: str, *, by: str) -> None:
        """The task fails for good: deadline, queue timeout, budget, or because its owner says so."""
        error = failure(kind, type_, message, retryable=False, attempt=row.attempt)
        self._fail_for_good(row, attempt, error, by=by)

    def _end(
        self,
        row: Row,
        attempt: Ledger | None,
        to: str,
        *,
        by: str,
        event: type[TaskEvent],
        named: dict[str, Any],
        error: dict[str, Any] | None = None,
        kept: str | None = None,
        **changes: Any,
    ) -> None:
        """A transition with or without a live lease."""
        if error is not None and "error" not in changes:
            changes["error"] = error
        if attempt is None:
            move(row, to, event=event, named=named, **changes)
            return
        ledger = to if to in TERMINAL else "failed"
        closed = {"cause": error}["cause"]
        columns = dict(changes)
        task_error = columns.pop("error", _ABSENT)
        extra = {} if task_error is _ABSENT else {"task_error": task_error}
        self._moves.off_lease(
            row, attempt, to, ledger=ledger, by=by, event=event, named=named, error=closed, result=kept, **extra, **columns
        )

    # -- cancelled
