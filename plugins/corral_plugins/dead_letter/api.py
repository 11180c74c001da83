"""The public interface of the dead letter queue: the `DeadLetters` service, its data types and the event."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "already_retried": (
            409,
            "The dead letter was already retried",
            "Check the state of the task. If the task fails again, a new dead letter is created.",
        ),
        "batch_in_progress": (409, "Another run is in progress", "Wait until the running operation has ended."),
    }
)

Reason = Literal["max_attempts", "crash_loop", "non_retryable", "expired", "budget", "manual"]
REASONS: tuple[Reason, ...] = ("max_attempts", "crash_loop", "non_retryable", "expired", "budget", "manual")


class DeadTask(msgspec.Struct, frozen=True, kw_only=True):
    """The data that a dead letter stores about its task, which failed for good.

    `error` is the `error` of the task. `snapshot` contains the title, instructions, input, priority and policies of the
    task as JSON text. `fence` is the number of times that workers have claimed the task so far. `first_failed_at` is
    the time at which an attempt first failed.
    """

    task_id: str
    title: str
    previous: str
    priority: str
    agent_id: str | None
    worker_id: str | None
    attempt: int
    created_by: str | None
    cause_chain: tuple[str, ...]
    workflow_run_id: str | None
    fence: int
    reason: Reason
    error: dict[str, Any]
    snapshot: str
    first_failed_at: str


class DeadLetters(Protocol):
    """Adds and closes dead letters. Every method runs in the caller's unit of work.

    The caller must lock the task before calling a method.
    """

    def add(self, letter_id: str, dead: DeadTask) -> None:
        """Add an open dead letter with this id. Call this method in the transaction that marks the task as failed."""
        ...

    def resolve(self, task_id: str, *, status: Literal["retried", "discarded"], by: str | None) -> bool:
        """Close the open dead letter of a task that is retried or deleted.

        Return whether the task had an open dead letter. `by` is the user who retried or deleted the task.
        """
        ...


class TaskDeadLettered(Event, kw_only=True):
    """A task failed for good, and a dead letter was added for it.

    `previous` is the task's status before the failure.
    """

    event = "task.dead_lettered"
    area = "tasks"

    task_id: str
    title: str
    status: str
    previous: str | None
    priority: str
    agent_id: str | None
    worker_id: str | None
    attempt: int
    dead_letter_id: str
    reason: str
    error_type: str
