"""The state machine of tasks.

Every transition is a single conditional UPDATE. The counters and the event are written in the same unit of work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.credentials import Credentials
from corral.database.unit import after_commit, current
from corral.errors import Conflict
from corral.events.event import emit
from corral.http.idempotency import expire_with_task
from corral.plugin import Settings
from corral_plugins.agents.api import Agents
from corral_plugins.cost.api import Costs
from corral_plugins.messages.api import Messages
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import TaskEvent, TaskUpdated
from corral_plugins.tasks.models import PRIORITIES, TERMINAL, AttemptRow, TaskRow, WorkerSignal
from corral_plugins.tasks.service import rows, statistics
from corral_plugins.tasks.service.statistics import TaskMetrics
from corral_plugins.tasks.service.usual_costs import UsualCosts
from corral_plugins.workers.api import Workers

NOT_CANCELLED: dict[str, Any] = {"cancel_kind": None, "cancel_reason": None, "cancel_requested_at": None}
NOT_WAITING: dict[str, Any] = {"waiting_for": None, "waiting_kind": None, "waiting_until": None}
"""The columns to reset when a task returns to the queue or stops waiting for a person."""
NOT_QUEUED: dict[str, Any] = {"queue": None, "queue_until": None}
TOP_RANK = 4
"""The highest rank, which is one above the rank of the priority `critical`.

A task that has waited long enough reaches this rank and is claimed before every new task.
"""


def queue_key(agent_id: str | None, role: str | None, tools: Sequence[str]) -> str:
    """Return the name of the queue for a task. All tasks in a queue require the same tools."""
    base = f"agent:{agent_id}" if agent_id is not None else f"role:{role}" if role is not None else "any"
    if not tools:
        return base
    digest = hashlib.sha256("\0".join(sorted(set(tools))).encode()).hexdigest()
    return f"{base}#{digest[:16]}"


def publish_task_event(kind: type[TaskEvent], row: TaskRow, previous: str | None, /, **fields: Any) -> None:
    """Emit an event about a task in its current state. `fields` are the additional fields of the event."""
    event = kind(
        task_id=row.id,
        title=row.title,
        status=row.status,
        previous=previous,
        priority=PRIORITIES[row.priority],
        agent_id=row.assigned_agent_id or row.agent_id,
        worker_id=row.worker_id,
        attempt=row.attempt,
        **fields,
    )
    emit(event, object=("task", row.id), owner=row.created_by, cause=tuple(row.get("cause_chain")) or None)


def transition(
    row: TaskRow,
    to: str,
    /,
    *,
    event: type[TaskEvent] = TaskUpdated,
    fields: dict[str, Any] | None = None,
    **changes: Any,
) -> None:
    """Change the status of a task and emit the event.

    `changes` are fields of the task, and `fields` are fields of the event. Raise `Conflict` if the stored version or
    status of the task differs from `row`.
    """
    previous = row.status
    rows.change_task(row, {"status": to, **changes})
    statistics.count_transition(previous, to, row.priority, row.created_by)
    publish_task_event(event, row, previous, **(fields or {}))
    if to in TERMINAL:
        expire_with_task(row.id)


class TaskTransitions:
    """Operations that several transitions share, such as ending a lease or sending a signal to a worker."""

    cost: Costs | None
    messages: Messages | None

    def __init__(
        self,
        settings: Settings,
        agents: Agents,
        workers: Workers,
        credentials: Credentials,
        metrics: TaskMetrics,
        usual_costs: UsualCosts,
    ) -> None:
        self.settings, self.agents, self.workers = settings, agents, workers
        self._credentials, self.metrics, self._usual_costs = credentials, metrics, usual_costs

    def end_lease(
        self,
        row: TaskRow,
        attempt: AttemptRow,
        to: str,
        /,
        *,
        attempt_status: str,
        by: str,
        event: type[TaskEvent] = TaskUpdated,
        fields: dict[str, Any] | None = None,
        cause: dict[str, Any] | None = None,
        late_result: str | None = None,
        **changes: Any,
    ) -> None:
        """Change the status of a task and end its live lease.

        `attempt_status` is the final status of the attempt, and `by` names the call or timer that ended the attempt.
        `cause` is the error of the attempt. `late_result` (JSON text) is a result that arrived too late for the task.
        """
        transition(row, to, event=event, fields=fields, lease_id=None, **changes)
        text = None if cause is None else rows.to_json_text(cause)
        rows.close_attempt(attempt, attempt_status, by=by[:40], error=text, result=late_result)
        self._evict_cached_token(attempt.lease_id)
        if attempt_status != "completed" and self.messages is not None:
            self.messages.put_back(attempt.lease_id)
        self.metrics.count_ended_attempt(attempt_status, by=by)
        self.agents.release_slot(attempt.agent_id, cause=tuple(row.get("cause_chain")))
        self.workers.release_slot(attempt.worker_id)
        if self.cost is not None:
            self.cost.release_attempt(attempt.id, is_capped=attempt.cost_limit_micro is not None)
            self._usual_costs.invalidate(attempt.agent_id)

    def _evict_cached_token(self, lease_id: str) -> None:
        """Remove the attempt's token from the credential cache after the commit.

        After the removal, the token is refused.
        """
        after_commit(lambda: self._credentials.forget_lease(lease_id))

    def stale_call_error(self) -> Conflict:
        """Count a call whose lease is not the task's live lease, and return the error for the call."""
        self.metrics.count_stale_call(current().entry.label)
        return rows.lease_lost_error()

    @staticmethod
    def send_signal(attempt: AttemptRow, state: str) -> None:
        """Send a signal to the worker of a lease: `lost` or `cancel_requested`."""
        WorkerSignal.insert(
            worker_id=attempt.worker_id,
            task_id=attempt.task_id,
            lease_id=attempt.lease_id,
            state=state,
            created_at=clock.now(),
        ).execute()

    def new_lease_expiry(self) -> str:
        """Return the time at which a lease would expire if it were renewed now."""
        return clock.now(self.settings.get(declared.LEASE_SECONDS))


def requeue_columns(row: TaskRow, *, delay_seconds: float = 0.0, available_at: str | None = None) -> dict[str, Any]:
    """Return the columns to set when a task becomes pending.

    The task is available immediately, after `delay_seconds`, or at the time `available_at`.
    """
    return queue_columns(
        key=row.queue_key,
        priority=row.priority,
        queue_timeout=row.get("queue_timeout_seconds"),
        available_at=available_at or clock.now(delay_seconds),
        now=clock.now(),
    )


def requeue_waiting(row: TaskRow, given: str) -> None:
    """Queue a waiting task again.

    `given` is the JSON text of an object, such as an answer, that the next claim includes.
    """
    answer = msgspec.Raw(given.encode())
    transition(row, "pending", resume=answer, resuming=True, **NOT_WAITING, **requeue_columns(row))


def queue_columns(*, key: str, priority: int, queue_timeout: int | None, available_at: str, now: str) -> dict[str, Any]:
    """Return the queue columns of a pending task.

    If the task is available at the time `now`, it enters its queue immediately. Otherwise, it enters the queue at
    `available_at`.
    """
    since = max(now, available_at)
    return {
        "queue": key if available_at <= now else None,
        "rank": priority,
        "available_at": available_at,
        "queued_at": since,
        "queue_until": add_seconds(since, queue_timeout) if queue_timeout else None,
    }


def add_seconds(since: str, seconds: float) -> str:
    """Return the time that is `seconds` after the time `since`."""
    return clock.format_instant(clock.parse_instant(since) + seconds)


def aged_rank(settings: Settings, *, priority: int, queued_at: str) -> int:
    """Return the rank of a task that has been in its queue since `queued_at`."""
    aging = settings.get(declared.AGING_SECONDS)
    steps = clock.elapsed_ms(queued_at, clock.now()) // (aging * 1000) if aging else 0
    return min(priority + steps, TOP_RANK)


def task_error(kind: str, type_: str, message: str, *, retryable: bool, attempt: int) -> dict[str, Any]:
    """Return the value of the `error` field of a task. The message is truncated to 4 KiB."""
    return {
        "kind": kind,
        "type": type_[:100],
        "message": truncate_bytes(message, 4096),
        "retryable": retryable,
        "attempt": attempt,
    }


def truncate_bytes(text: str, size: int) -> str:
    """Return the text truncated to at most `size` bytes, without splitting a character."""
    data = text.encode()
    return text if len(data) <= size else data[:size].decode(errors="ignore")


def result_summary(result: str | None) -> str:
    """Return at most the first 1 KiB of a result (JSON text), for use in events.

    If the result is an object whose field `text` is a string, that string is used instead of the whole result.
    """
    if result is None:
        return ""
    value = msgspec.json.decode(result)
    text = value["text"] if isinstance(value, dict) and isinstance(value.get("text"), str) else result
    return truncate_bytes(text, 1024)
