"""The last failures on each worker, read from the events of tasks."""

from __future__ import annotations

from typing import Any

from corral.events.log import Record
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import rows

EVENTS = ("task.failed", "task.retried")
KEPT = 10
MESSAGE_LENGTH = 500


def remember(event: Record) -> None:
    """Keep a failure with the worker that it happened on; a task that a person retries is none."""
    told = event.payload()
    worker_id = told.get("worker_id")
    failure = _failure(event, told)
    row = rows.find(worker_id) if isinstance(worker_id, str) and failure is not None else None
    if row is not None:
        errors = [failure, *row.last_errors][:KEPT]
        Worker.update(last_errors=errors).where(Worker.id == row.id).execute()


def _failure(event: Record, told: dict[str, Any]) -> dict[str, Any] | None:
    error = told.get("error")
    if event.type == "task.retried":
        if told.get("source") != "policy" or not told.get("reason"):
            return None
        error = {"type": told["reason"], "message": "The task is tried again."}
    if not isinstance(error, dict):
        return None
    return {
        "at": event.ts,
        "task_id": event.object_id,
        "type": str(error.get("type", ""))[:100],
        "message": str(error.get("message", ""))[:MESSAGE_LENGTH],
    }
