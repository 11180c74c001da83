"""The state machine of tasks: every transition is one guarded update, written with its counters and its event."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.credentials import Credentials
from corral.database.unit import after_commit
from corral.events.event import emit
from corral.plugin import Settings
from corral_plugins.agents.api import Agents
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.events import TaskEvent, TaskUpdated
from corral_plugins.tasks.models import PRIORITIES, AttemptRow, TaskRow, WorkerSignal
from corral_plugins.tasks.service import rollups, rows
from corral_plugins.tasks.service.metrics import TaskMetrics
from corral_plugins.workers.api import Workers

NOT_CANCELLED: dict[str, Any] = {"cancel_kind": None, "cancel_reason": None, "cancel_requested_at": None}
NOT_WAITING: dict[str, Any] = {"waiting_for": None, "waiting_kind": None, "waiting_until": None}
"""The columns that a task loses when it goes back to the queue, and when it does not wait for a person any more."""
NOT_QUEUED: dict[str, Any] = {"queue": None, "queue_until": None}
TOP_RANK = 4
"""One above `critical`: a task that has waited long enough comes before every new one."""


def queue_key(agent_id: str | None, role: str | None, tools: Sequence[str]) -> str:
    """The name of the queue, which is the partition that claims read. All its tasks require the same tools."""
    base = f"agent:{agent_id}" if agent_id is not None else f"role:{role}" if role is not None else "any"
    if not tools:
        return base
    digest = hashlib.sha256("\0".join(sorted(set(tools))).encode()).hexdigest()
    return f"{base}#{digest[:16]}"


def publish(kind: type[TaskEvent], row: TaskRow, previous: str | None, /, **fields: Any) -> None:
    """Emit an event about a task in its present state. `fields` are the further fields of the event."""
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
    """Move a task to another status. `changes` are fields of the task, `fields` those of the event.

    Raises `Conflict` when the task is not as `row` says any more.
    """
    previous = row.status
    rows.change(row, {"status": to, **changes})
    rollups.count_transition(previous, to, row.priority, row.created_by)
    publish(event, row, previous, **(fields or {}))


class Transitions:
    """The parts that transitions share: queueing a task, and ending a lease."""

    def __init__(
        self, settings: Settings, agents: Agents, workers: Workers, credentials: Credentials, metrics: TaskMetrics
    ) -> None:
        self.settings, self.agents, self.workers = settings, agents, workers
        self._credentials, self.metrics = credentials, metrics

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
        """Make a transition that ends the live lease.

        `attempt_status` is the last status of the attempt, and `by` names the call or timer that ended it. `cause` is
        the error of the attempt; `late_result` (JSON text) is a result that came too late for the task.
        """
        transition(row, to, event=event, fields=fields, lease_id=None, **changes)
        text = None if cause is None else rows.as_text(cause)
        rows.close(attempt, attempt_status, by=by[:40], error=text, result=late_result)
        self._forget_token(attempt.lease_id)
        self.metrics.attempt_ended(attempt_status, by=by)
        self.agents.lease_ended(attempt.agent_id)
        self.workers.lease_ended(attempt.worker_id)

    def _forget_token(self, lease_id: str) -> None:
        """Refuse the token of the attempt from the commit on."""
        after_commit(lambda: self._credentials.forget(lambda principal: principal.lease_id == lease_id))

    @staticmethod
    def signal(attempt: AttemptRow, state: str) -> None:
        """Notify the worker of a lease at once: `lost` or `cancel_requested`."""
        WorkerSignal.insert(
            worker_id=attempt.worker_id,
            task_id=attempt.task_id,
            lease_id=attempt.lease_id,
            state=state,
            created_at=clock.now(),
        ).execute()

    def lease_until(self) -> str:
        """The end of a lease that is renewed now."""
        return clock.now(self.settings.get(declared.LEASE_SECONDS))


def queued(row: TaskRow, *, delay_seconds: float = 0.0, available_at: str | None = None) -> dict[str, Any]:
    """The columns of a task that becomes pending now, after a delay, or at a given instant."""
    return queued_columns(
        key=row.queue_key,
        priority=row.priority,
        queue_timeout=row.get("queue_timeout_seconds"),
        available_at=available_at or clock.now(delay_seconds),
        now=clock.now(),
    )


def queued_columns(
    *, key: str, priority: int, queue_timeout: int | None, available_at: str, now: str
) -> dict[str, Any]:
    """The columns of a pending task, which is in its queue when it is available `now`, and parked until then if not."""
    since = max(now, available_at)
    return {
        "queue": key if available_at <= now else None,
        "rank": priority,
        "available_at": available_at,
        "queued_at": since,
        "queue_until": later(since, queue_timeout) if queue_timeout else None,
    }


def later(since: str, seconds: float) -> str:
    """The instant so many seconds after another."""
    return clock.format_instant(clock.parse_instant(since) + seconds)


def rank_of(settings: Settings, *, priority: int, queued_at: str) -> int:
    """The rank of a task that has been in its queue since `queued_at`."""
    aging = settings.get(declared.AGING_SECONDS)
    steps = clock.elapsed_ms(queued_at, clock.now()) // (aging * 1000) if aging else 0
    return min(priority + steps, TOP_RANK)


def failure(kind: str, type_: str, message: str, *, retryable: bool, attempt: int) -> dict[str, Any]:
    """The `error` of a task, with at most 4 KiB of the message."""
    return {
        "kind": kind,
        "type": type_[:100],
        "message": clipped(message, 4096),
        "retryable": retryable,
        "attempt": attempt,
    }


def clipped(text: str, size: int) -> str:
    """At most `size` bytes of the text, cut between characters."""
    data = text.encode()
    return text if len(data) <= size else data[:size].decode(errors="ignore")


def summary(result: str | None) -> str:
    """At most 1 KiB of a result (JSON text), for events."""
    if result is None:
        return ""
    value = msgspec.json.decode(result)
    text = value["text"] if isinstance(value, dict) and isinstance(value.get("text"), str) else result
    return clipped(text, 1024)
