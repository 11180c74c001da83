"""Decides which failed tasks get a dead letter, and adds and closes dead letters through the `dead_letter` plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from peewee import SQL

from corral import clock
from corral.database.statement import Statement
from corral.ids import new_id
from corral_plugins.dead_letter.api import DeadLetters, DeadTask, Reason
from corral_plugins.tasks.api import AttemptSummary
from corral_plugins.tasks.models import PRIORITIES, Attempt, Task, TaskRow
from corral_plugins.tasks.service import rows

FAILURES = frozenset({"error", "timeout", "lease_lost", "stalled", "deadline", "queue_timeout", "budget"})
"""The kinds of error for which a task that fails permanently gets a dead letter."""
BATCH_SIZE = 200
POLICIES = ("retry_policy", "stall_policy", "output_schema")

_SNAPSHOT = Statement(
    lambda p: Task.select(Task.description, Task.instructions, Task.input).where(Task.id == p("id")).tuples()
)
_FIRST_FAILURE = Statement(
    lambda p: (
        Attempt.select(Attempt.finished_at)
        .where((Attempt.task_id == p("id")) & Attempt.error.is_null(False))
        .order_by(Attempt.fence)
        .limit(1)
        .tuples()
    )
)
_ATTEMPTS = Statement(
    lambda p: (
        Attempt.select(
            Attempt.n,
            Attempt.worker_id,
            Attempt.agent_id,
            Attempt.agent_version,
            Attempt.started_at,
            Attempt.finished_at,
            Attempt.error,
        )
        .where((Attempt.task_id == p("id")) & (Attempt.fence > p("after")) & (Attempt.fence <= p("until")))
        .order_by(Attempt.fence)
        .limit(BATCH_SIZE)
        .tuples()
    )
)


def reason_of(row: TaskRow, error: dict[str, Any]) -> Reason:
    """Return the reason why a task failed permanently, based on its error."""
    kind, type_ = error["kind"], error["type"]
    if type_ in ("crash_loop", "manual"):
        return "crash_loop" if type_ == "crash_loop" else "manual"
    if kind in ("deadline", "queue_timeout"):
        return "expired"
    if kind == "budget":
        return "budget"
    return "max_attempts" if error["retryable"] and row.attempt >= row.max_attempts else "non_retryable"


class TaskDeadLetters:
    """Adds and closes the dead letters of tasks. Every method runs in the caller's unit of work."""

    dead_letters: DeadLetters | None

    def new_letter_id(self, error: dict[str, Any]) -> str | None:
        """Return a new id for the dead letter of a task that fails with this error.

        Return None if failures of this kind do not get a dead letter, or if the `dead_letter` plugin is not active.
        """
        return new_id() if self.dead_letters is not None and error["kind"] in FAILURES else None

    def add(self, row: TaskRow, letter_id: str | None, *, previous: str, reason: Reason | None = None) -> None:
        """Add the dead letter for a task that has just failed, unless `letter_id` is None.

        `previous` is the task's status before the failure.
        """
        if letter_id is None or self.dead_letters is None:
            return
        error: dict[str, Any] = row.get("error")
        first = _FIRST_FAILURE.one({"id": row.id})
        dead = DeadTask(
            task_id=row.id,
            title=row.title,
            previous=previous,
            priority=PRIORITIES[row.priority],
            agent_id=row.assigned_agent_id or row.agent_id,
            worker_id=row.worker_id,
            attempt=row.attempt,
            created_by=row.created_by,
            cause_chain=tuple(row.get("cause_chain")),
            workflow_run_id=row.workflow_run_id,
            fence=row.fence,
            reason=reason or reason_of(row, error),
            error=error,
            snapshot=_snapshot(row),
            first_failed_at=first[0] if first is not None and first[0] is not None else clock.now(),
        )
        self.dead_letters.add(letter_id, dead)

    def add_to_failed(self, row: TaskRow, *, reason: Reason | None = None) -> str | None:
        """Add a dead letter for a locked task that has already failed, and return the id of the dead letter.

        Return None if the `dead_letter` plugin is not active.
        """
        if self.dead_letters is None:
            return None
        letter_id = new_id()
        rows.change_task(row, {"dead_letter_id": letter_id})
        self.add(row, letter_id, previous=row.status, reason=reason)
        return letter_id

    def close(self, row: TaskRow, *, by: str | None, is_retry: bool) -> None:
        """Close the task's open dead letter, if there is one, because the task is retried or deleted."""
        if self.dead_letters is not None and row.get("dead_letter_id") is not None:
            self.dead_letters.resolve(row.id, status="retried" if is_retry else "discarded", by=by)

    def add_missing(self, after: str) -> str | None:
        """Add dead letters for tasks that failed after the time `after` while the `dead_letter` plugin was not active.

        One call handles one batch of ended tasks. Return the value of `after` for the next batch, or None if there are
        no more tasks.
        """
        instant, _, last_id = after.partition(" ")
        later = (Task.finished_at > instant) | ((Task.finished_at == instant) & (Task.id > last_id))
        ended = SQL("finished_at IS NOT NULL") & (Task.finished_at >= instant) & later
        query: Any = Task.select(Task.id, Task.finished_at, Task.status).where(ended)
        found = list(query.order_by(Task.finished_at, Task.id).limit(BATCH_SIZE).tuples())
        for task_id in [task_id for task_id, _, status in found if status == "failed"]:
            row = rows.lock_task(task_id)
            error = row.get("error")
            if row.status == "failed" and row.get("dead_letter_id") is None and error and error["kind"] in FAILURES:
                self.add_to_failed(row)
        return f"{found[-1][1]} {found[-1][0]}" if len(found) == BATCH_SIZE else None


def attempts_between(task_id: str, *, after_fence: int, until_fence: int) -> list[AttemptSummary]:
    """Return at most 200 attempts of a task, oldest first, with fencing numbers in the given range.

    The range excludes `after_fence` and includes `until_fence`.
    """
    found = _ATTEMPTS.rows({"id": task_id, "after": after_fence, "until": until_fence})
    return [
        AttemptSummary(
            n=n,
            worker_id=worker_id,
            agent_id=agent_id,
            agent_version=version,
            started_at=started_at,
            finished_at=finished_at,
            error=rows.parse_json_text(error),
        )
        for n, worker_id, agent_id, version, started_at, finished_at, error in found
    ]


def statuses_of(task_ids: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Return the status and the end time of each task, keyed by task id. Unknown ids are omitted."""
    found = Task.select(Task.id, Task.status, Task.finished_at).where(Task.id.in_(list(task_ids)))
    return {task_id: (status, finished_at) for task_id, status, finished_at in rows.fetch_tuples(found)}


def _snapshot(row: TaskRow) -> str:
    description, instructions, input_ = _SNAPSHOT.one({"id": row.id}) or ("", "", "{}")
    return rows.to_json_text(
        {
            "title": row.title,
            "description": description,
            "instructions": instructions,
            "input": msgspec.Raw(input_.encode()),
            "priority": PRIORITIES[row.priority],
            "agent_id": row.agent_id,
            "agent_role": row.agent_role,
            "timeout_seconds": row.timeout_seconds,
            **{name: row.get(name) for name in POLICIES},
        }
    )
