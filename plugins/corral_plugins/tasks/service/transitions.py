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
from corral_plugins.tasks.models import NO_DEADLINE, PRIORITIES, WorkerSignal
from corral_plugins.tasks.service import rollups, rows
from corral_plugins.tasks.service.rollups import TaskMetrics
from corral_plugins.tasks.service.rows import AttemptRow, TaskRow
from corral_plugins.workers.api import Workers


def queue_key(agent_id: str | None, role: str | None, tools: Sequence[str]) -> str:
    """Who may take a task: the partition that claims look into. All tasks of one need the same tools."""
    base = f"agent:{agent_id}" if agent_id is not None else f"role:{role}" if role is not None else "any"
    if not tools:
        return base
    digest = hashlib.sha256("\0".join(sorted(set(tools))).encode()).hexdigest()
    return f"{base}#{digest[:16]}"


def publish(kind: type[TaskEvent], row: TaskRow, previous: str | None, /, **named: Any) -> None:
    """Emit an event about a task as it is now."""
    event = kind(
        task_id=row.id,
        title=row.title,
        status=row.status,
        previous=previous,
        priority=PRIORITIES[row.priority],
        agent_id=row.assigned_agent_id or row.agent_id,
        worker_id=row.worker_id,
        attempt=row.attempt,
        **named,
    )
    cause = tuple(rows.parsed(row.cause_chain)) if row.cause_chain != "[]" else None
    emit(event, object=("task", row.id), owner=row.created_by, cause=cause)


def transition(
    row: TaskRow,
    to: str,
    /,
    *,
    event: type[TaskEvent] = TaskUpdated,
    named: dict[str, Any] | None = None,
    **changes: Any,
) -> None:
    """One transition: the row must still be as `row` says. `changes` are columns; `named` goes into the event."""
    previous = row.status
    rows.change(row, {"status": to, **changes})
    rollups.count_transition(previous, to, row.priority, row.created_by)
    publish(event, row, previous, **(named or {}))


class Transitions:
    """What transitions share: queueing, and the end of a lease."""

    def __init__(
        self, settings: Settings, agents: Agents, workers: Workers, credentials: Credentials, metrics: TaskMetrics
    ) -> None:
        self.settings, self.agents, self.workers = settings, agents, workers
        self._credentials, self.metrics = credentials, metrics

    def queued(self, row: TaskRow, *, delay_seconds: float = 0.0, available_at: str | None = None) -> dict[str, Any]:
        """The columns of a task that becomes pending, at once or later."""
        return queued_columns(
            self.settings,
            key=row.queue_key,
            priority=row.priority,
            deadline=row.deadline,
            queue_timeout=row.queue_timeout_seconds,
            available_at=available_at or clock.now(delay_seconds),
        )

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
        named: dict[str, Any] | None = None,
        cause: dict[str, Any] | None = None,
        kept: str | None = None,
        **changes: Any,
    ) -> None:
        """Make a transition that ends the live lease.

        `attempt_status` is the last status of the attempt, and `by` names the call or timer that ended it. `cause` is
        the error of the attempt; `kept` (JSON text) is a result that came too late for the task.
        """
        transition(row, to, event=event, named=named, lease_id=None, **changes)
        text = None if cause is None else msgspec.json.encode(cause).decode()
        rows.close(attempt, attempt_status, by=by[:40], error=text, result=kept)
        self._forget_token(attempt.lease_id)
        self.metrics.attempt_ended(attempt_status, by=by)
        self.agents.lease_ended(attempt.agent_id)
        self.workers.lease_ended(attempt.worker_id)

    def _forget_token(self, lease_id: str) -> None:
        """Have the attempt's token refused from the commit on."""
        after_commit(lambda: self._credentials.forget(lambda principal: principal.lease_id == lease_id))

    def signal(self, attempt: AttemptRow, state: str) -> None:
        """Tell the worker of a lease something at once: `lost` or `cancel_requested`."""
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


NOT_CANCELLED: dict[str, Any] = {"cancel_kind": None, "cancel_reason": None, "cancel_requested_at": None}
"""What a task forgets when it goes back to the queue."""


def queued_columns(
    settings: Settings, *, key: str, priority: int, deadline: str | None, queue_timeout: int | None, available_at: str
) -> dict[str, Any]:
    """The columns of a pending task: in its queue now, or parked until it is available."""
    now = clock.now()
    aging = settings.get(declared.AGING_SECONDS)
    is_ready = available_at <= now
    since = max(now, available_at)
    return {
        "queue": key if is_ready else None,
        "rank": priority,
        "rank_at": clock.now(aging) if is_ready else None,
        "deadline_key": deadline or NO_DEADLINE,
        "available_at": available_at,
        "queued_at": since,
        "queue_until": clock.format_instant(clock.parse_instant(since) + queue_timeout) if queue_timeout else None,
    }


TOP_RANK = 4
"""One above `critical`: what has waited long enough comes before whatever is new."""


def aged_columns(settings: Settings, *, priority: int, queued_at: str) -> dict[str, Any]:
    """The rank of a task that may be claimed since `queued_at`, and when it grows next."""
    aging = settings.get(declared.AGING_SECONDS)
    steps = aging_steps(queued_at, aging)
    if priority + steps >= TOP_RANK:
        return {"rank": TOP_RANK, "rank_at": None}
    grows_at = clock.parse_instant(queued_at) + (steps + 1) * aging
    return {"rank": priority + steps, "rank_at": clock.format_instant(grows_at)}


def aging_steps(queued_at: str, aging: int) -> int:
    """How many times a task has waited the `aging` seconds."""
    return clock.elapsed_ms(queued_at, clock.now()) // (aging * 1000) if aging else 0


def failure(kind: str, type_: str, message: str, *, retryable: bool, attempt: int) -> dict[str, Any]:
    """The `error` of a task. At most 4 KiB of message are kept."""
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
    """At most 1 KiB of a result, for events."""
    if result is None:
        return ""
    value = msgspec.json.decode(result)
    text = value["text"] if isinstance(value, dict) and isinstance(value.get("text"), str) else result
    return clipped(text, 1024)
