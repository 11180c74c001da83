"""The events of tasks: one event for each transition, in the order in which a task can reach the states."""

from __future__ import annotations

from typing import Any

from corral.events.event import Event


class TaskEvent(Event, kw_only=True):
    """The fields that all task events share. `previous` is the status before the event, or null for a new task."""

    task_id: str
    title: str
    status: str
    previous: str | None
    priority: str
    agent_id: str | None
    worker_id: str | None
    attempt: int


class TaskCreated(TaskEvent, kw_only=True):
    """A task was created."""

    event = "task.created"


class TaskAssigned(TaskEvent, kw_only=True):
    """A worker claimed a task."""

    event = "task.assigned"


class TaskStarted(TaskEvent, kw_only=True):
    """A worker started a task."""

    event = "task.started"


class TaskProgressed(TaskEvent, kw_only=True):
    """A run reported progress. At most one event is emitted per second."""

    event = "task.progress"

    progress: dict[str, Any]


class TaskWaiting(TaskEvent, kw_only=True):
    """A task started to wait for a person's approval or input."""

    event = "task.waiting"

    waiting_for: dict[str, Any] | None


class TaskStalled(TaskEvent, kw_only=True):
    """A run made no progress (`idle`) or repeated the same step (`loop`)."""

    event = "task.stalled"

    kind: str
    idle_ms: int


class TaskCompleted(TaskEvent, kw_only=True):
    """A task was completed."""

    event = "task.completed"

    result_summary: str
    duration_ms: int | None
    cost_usd: float


class TaskFailed(TaskEvent, kw_only=True):
    """A task failed permanently."""

    event = "task.failed"

    error: dict[str, Any]


class TaskCancelled(TaskEvent, kw_only=True):
    """A task was cancelled."""

    event = "task.cancelled"

    reason: str | None


class TaskRetried(TaskEvent, kw_only=True):
    """A task was queued again: by its retry policy, by a person, or from a dead letter."""

    event = "task.retried"

    source: str
    reason: str | None
    available_at: str


class TaskUpdated(TaskEvent, kw_only=True):
    """A task changed in a way that no other event describes."""

    event = "task.updated"


class TaskDeleted(TaskEvent, kw_only=True):
    """A task was deleted."""

    event = "task.deleted"


ALL: tuple[type[Event], ...] = (
    TaskCreated,
    TaskAssigned,
    TaskStarted,
    TaskProgressed,
    TaskWaiting,
    TaskStalled,
    TaskCompleted,
    TaskFailed,
    TaskCancelled,
    TaskRetried,
    TaskUpdated,
    TaskDeleted,
)
