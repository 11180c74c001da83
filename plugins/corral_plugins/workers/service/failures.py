"""The last ten failures of tasks on each worker, collected from task events."""

from __future__ import annotations

from typing import Any

from corral.events.log import LoggedEvent
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import repository

EVENTS = ("task.failed", "task.retried")
KEEP = 10
MESSAGE_LENGTH = 500


def store_failure(event: LoggedEvent) -> None:
    """Store the failure of a task with the worker on which the failure happened.

    A retry that a person requested does not count as a failure.
    """
    payload = event.payload()
    worker_id = payload.get("worker_id")
    failure = _failure(event, payload)
    row = repository.find(worker_id) if isinstance(worker_id, str) and failure is not None else None
    if row is not None:
        errors = [failure, *row.last_errors][:KEEP]
        Worker.update(last_errors=errors).where(Worker.id == row.id).execute()


def _failure(event: LoggedEvent, payload: dict[str, Any]) -> dict[str, Any] | None:
    error = payload.get("error")
    if event.type == "task.retried":
        if payload.get("source") != "policy" or not payload.get("reason"):
            return None
        error = {"type": payload["reason"], "message": "The task is retried."}
    if not isinstance(error, dict):
        return None
    return {
        "at": event.ts,
        "task_id": event.object_id,
        "type": str(error.get("type", ""))[:100],
        "message": str(error.get("message", ""))[:MESSAGE_LENGTH],
    }
