"""Reading worker rows, and telling what happened to them."""

from __future__ import annotations

from typing import Any, TypeVar

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Conflict, Forbidden, NotFound
from corral.events.event import emit
from corral_plugins.workers.api import WorkerEvent
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service.shapes import WorkerView

V = TypeVar("V", bound=WorkerView)

PRESENT = ("online", "offline")
APPROVED = ("online", "offline", "draining")
EMBEDDED = "embedded"
PEOPLE = ("user", "api_key")

FACTS_COLUMNS = (
    Worker.id,
    Worker.name,
    Worker.status,
    Worker.is_approved,
    Worker.group,
    Worker.labels,
    Worker.tool_names,
    Worker.max_agents,
    Worker.active_leases,
    Worker.embedded,
)
FACTS = Statement(lambda p: Worker.select(*FACTS_COLUMNS).where(Worker.id == p("id")).tuples())


def find(worker_id: str) -> Worker | None:
    """A worker's row."""
    row: Worker | None = Worker.get_or_none(Worker.id == worker_id)
    return row


def get(worker_id: str) -> Worker:
    """A worker's row; `NotFound`."""
    row = find(worker_id)
    if row is None:
        raise NotFound()
    return row


def change(where: Any, **values: Any) -> int:
    """A guarded update that people see as a change: a new version."""
    update = Worker.update(**values, version=Worker.version + 1, updated_at=clock.now())
    return int(update.where(where).execute())


def tell(kind: type[WorkerEvent], row: Worker, **named: Any) -> None:
    """Emit an event about a worker as `row` is now."""
    event = kind(worker_id=row.id, name=row.name, group=row.group, status=row.status, **named)
    emit(event, object=("worker", row.id), owner=row.created_by)


def view(row: Worker, kind: type[V], **more: Any) -> V:
    """A worker as it is shown."""
    shown = {name: getattr(row, name) for name in WorkerView.__struct_fields__ if name != "capacity"}
    return kind(**shown, capacity=row.max_agents, **more)


def require_self(worker_id: str, caller: Principal) -> None:
    """The worker itself; `Forbidden` for every other caller."""
    if caller.kind != "worker" or caller.worker_id != worker_id:
        raise Forbidden("A worker acts with its own token, on its own paths.")


def require_own(row: Worker, caller: Principal) -> None:
    """The worker itself, the person who registered it, or an admin; others get `Forbidden`."""
    if caller.kind == "worker":
        require_self(row.id, caller)
    elif caller.limited is not None:
        raise Forbidden(code=caller.limited)
    elif not (caller.is_admin or (caller.kind in PEOPLE and row.created_by == caller.user_id)):
        raise Forbidden("Only the worker itself, who registered it, or an admin may do this.")


def refuse(row: Worker, what: str) -> Conflict:
    """The state forbids it."""
    return Conflict(f"A worker that is {row.status} cannot be {what}.", current_status=row.status)


def moved(row: Worker) -> Conflict:
    """Somebody was faster."""
    return Conflict("The worker was changed meanwhile; read it again.", current_status=row.status)
