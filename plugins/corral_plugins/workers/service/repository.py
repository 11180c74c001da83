"""Shared functions for worker rows: reads, conditional updates, events, response bodies and access checks."""

from __future__ import annotations

from typing import Any, TypeVar

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.database.unit import after_commit, locked
from corral.errors import Conflict, Forbidden, NotFound
from corral.events.event import emit
from corral.events.log import LoggedEvent
from corral_plugins.tasks.api import Tasks
from corral_plugins.workers.api import WorkerEvent
from corral_plugins.workers.models import Worker
from corral_plugins.workers.shapes import WorkerView

V = TypeVar("V", bound=WorkerView)

CAN_CLAIM = ("online", "offline")
APPROVED = ("online", "offline", "draining")
EMBEDDED = "embedded"
PEOPLE = ("user", "api_key")
NOT_APPROVED = "worker_not_approved"


def find_worker(worker_id: str) -> Worker | None:
    """Return the row of a worker, or None if the worker does not exist."""
    row: Worker | None = Worker.get_or_none(Worker.id == worker_id)
    return row


def get_worker(worker_id: str) -> Worker:
    """Return the row of a worker. Raise `NotFound` if the worker does not exist."""
    row = find_worker(worker_id)
    if row is None:
        raise NotFound("There is no worker with this id.")
    return row


def lock_worker(worker_id: str) -> Worker | None:
    """Lock the row of a worker until the unit of work ends. Return the row, or None if the worker does not exist."""
    row: Worker | None = locked(Worker.select().where(Worker.id == worker_id)).first()
    return row


def change_worker(where: Any, **values: Any) -> int:
    """Update the workers that match the condition `where`, increment their versions, and return their number."""
    update = Worker.update(**values, version=Worker.version + 1, updated_at=clock.now())
    return int(update.where(where).execute())


def change_and_read_worker(where: Any, **values: Any) -> Worker | None:
    """Update the worker that matches `where`, like `change_worker`, and return the updated row.

    Return None if no worker matches. The worker's events must be published with this row, because a row that was read
    without a lock may be out of date.
    """
    update = Worker.update(**values, version=Worker.version + 1, updated_at=clock.now()).where(where)
    return next(iter(list(update.returning(Worker).execute())), None)


def bring_online(worker_id: str, **values: Any) -> Worker | None:
    """Set an offline worker to `online`, and return its row.

    Return None if the worker is no longer `offline`, for example because another process has already set it to
    `online`.
    """
    where = (Worker.id == worker_id) & (Worker.status == "offline")
    return change_and_read_worker(where, status="online", **values)


def publish_worker_event(kind: type[WorkerEvent], row: Worker, **fields: Any) -> None:
    """Emit a worker event of class `kind` with the worker's state from `row`. The row must be locked."""
    event = kind(worker_id=row.id, name=row.name, group=row.group, status=row.status, **fields)
    emit(event, object=("worker", row.id), owner=row.created_by)


def worker_view(row: Worker, kind: type[V], **more: Any) -> V:
    """Convert a row into the response body `kind`. `more` contains fields of `kind` that are not in the row."""
    shown = {name: getattr(row, name) for name in WorkerView.__struct_fields__ if name != "capacity"}
    return kind(**shown, capacity=row.max_agents, **more)


def require_own_token(worker_id: str, caller: Principal) -> None:
    """Raise `Forbidden` unless the caller is this worker."""
    if caller.kind != "worker" or caller.worker_id != worker_id:
        raise Forbidden("Only the worker itself, with its own token, may perform this operation.")


def require_worker_or_owner(row: Worker, caller: Principal) -> None:
    """Raise `Forbidden` unless the caller is the worker, the person who registered it, or an admin."""
    if caller.kind == "worker":
        require_own_token(row.id, caller)
    elif caller.limited is not None:
        raise Forbidden(code=caller.limited)
    elif not (caller.is_admin or (caller.kind in PEOPLE and row.created_by == caller.user_id)):
        raise Forbidden("Only the worker itself, the person who registered it, or an admin may perform this operation.")


def wrong_status_error(row: Worker, action: str) -> Conflict:
    """Return the error for a transition that the status of the worker does not permit."""
    return Conflict(f"A worker that is {row.status} cannot be {action}.", current_status=row.status)


def changed_error(row: Worker) -> Conflict:
    """Return the error for an update that failed because another request changed the worker first."""
    return Conflict(
        "The worker was changed in the meantime; fetch it again and repeat the change.", current_status=row.status
    )


def release_leases_of(tasks: Tasks | None, worker_id: str, reason: str) -> int:
    """Release every live lease of a worker without consuming an attempt. Return the number of released leases.

    `reason` (`registered`, `rejected` or `deleted`) is stored with the attempts. Tasks must be locked before workers.
    Callers therefore release the leases, change the worker's row, and release the leases again. The second call
    releases leases that were claimed between the first call and the change. After the change, the worker cannot claim
    tasks.
    """
    return tasks.release_leases_of_worker(worker_id, reason=reason) if tasks is not None else 0


def forget_credentials(credentials: Credentials, worker_id: str) -> None:
    """Remove a worker's cached principals after the commit, so that its tokens and its approval are read again."""
    after_commit(lambda: credentials.forget(lambda principal: principal.worker_id == worker_id))


# -- failures of tasks


EVENTS = ("task.failed", "task.retried")
KEEP = 10
MESSAGE_LENGTH = 500


def record_task_failure(event: LoggedEvent) -> None:
    """Add a task's failure to the last failures of the worker that ran the task.

    A retry that a person requested does not count as a failure.
    """
    payload = event.payload()
    worker_id = payload.get("worker_id")
    failure = _failure_from_event(event, payload)
    row = find_worker(worker_id) if isinstance(worker_id, str) and failure is not None else None
    if row is not None:
        errors = [failure, *row.last_errors][:KEEP]
        Worker.update(last_errors=errors).where(Worker.id == row.id).execute()


def _failure_from_event(event: LoggedEvent, payload: dict[str, Any]) -> dict[str, Any] | None:
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
