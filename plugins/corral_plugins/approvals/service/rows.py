"""Reads, locks and changes the rows of approvals, and publishes events about approvals.

Every status change is one conditional UPDATE, which has no effect if another unit of work changed the row first.
"""

from __future__ import annotations

from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.errors import Conflict, NotFound
from corral.events.event import emit
from corral_plugins.approvals.api import OPEN, ApprovalEvent, ApprovalFacts, HeldToolCall
from corral_plugins.approvals.models import IS_OPEN, Approval

MACHINES = ("agent", "worker")

_OPEN_OF_TASK = Statement(
    lambda p: Approval.select(Approval.id).where((Approval.task_id == p("task_id")) & IS_OPEN).tuples()
)


def readable(by: Principal) -> Any:
    """Return an SQL condition that selects the approvals that the caller may read.

    Agents and workers may read only their own requests.
    """
    found = visible(Approval, by)
    if by.kind == "agent":
        return found & (Approval.agent_id == by.agent_id)
    if by.kind == "worker":
        return found & (Approval.requester_type == "worker") & (Approval.requester_id == by.worker_id)
    return found


def find_readable(approval_id: str, by: Principal) -> Approval:
    """Return an approval. Raise `NotFound` if it does not exist or the caller may not read it."""
    row: Approval | None = Approval.get_or_none((Approval.id == approval_id.lower()) & readable(by))
    if row is None:
        raise NotFound("There is no approval request with this id.")
    return row


def lock(approval_id: str) -> Approval | None:
    """Lock and return an approval, or return None if it does not exist.

    The caller must lock the approval's task first.
    """
    row: Approval | None = locked(Approval.select().where(Approval.id == approval_id)).first()
    return row


def open_ids_of_task(task_id: str) -> list[str]:
    """Return the ids of the open approvals of a task."""
    return [row[0] for row in _OPEN_OF_TASK.rows({"task_id": task_id})]


def update_if_open(row: Approval, **changes: Any) -> None:
    """Change an open approval. Raise `Conflict` if another unit of work has changed it since it was read."""
    values = {"updated_at": clock.now(), **changes, "version": row.version + 1}
    unchanged = (Approval.id == row.id) & (Approval.version == row.version) & Approval.status.in_(OPEN)
    if not Approval.update(values).where(unchanged).execute():
        raise already_decided_error(Approval.get_by_id(row.id).status)
    for name, value in values.items():
        setattr(row, name, value)


def already_decided_error(status: str) -> Conflict:
    """Return the error for a decision on an approval request that is already resolved."""
    return Conflict(f"The approval request is already {status}.", code="already_decided", current_status=status)


def is_overdue(row: Approval) -> bool:
    """Return whether an open approval has passed its expiry time."""
    return row.status in OPEN and row.expires_at <= clock.now()


def shown_status(row: Approval) -> str:
    """Return the status that the API shows.

    An overdue approval is shown as expired even before the scheduled job has ended it.
    """
    return "expired" if is_overdue(row) and row.on_timeout == "reject" else str(row.status)


def current_hash(row: Approval) -> str:
    """Return the hash of the content to execute: the edited payload if there is one, or else the requested payload."""
    return str(row.edited_sha256 or row.payload_sha256)


def approvals_of(row: Approval) -> list[dict[str, Any]]:
    """Return the decisions that approve the current content. Approvals of earlier content are omitted."""
    content = current_hash(row)
    return [each for each in row.decisions if each["decision"] == "approve" and each["payload_sha256"] == content]


def facts_of(row: Approval, *, is_new: bool = False) -> ApprovalFacts:
    """Return an approval in the form that other plugins receive."""
    is_edited = row.edited_sha256 is not None
    last = row.decisions[-1] if row.decisions else None
    stored: Any = row
    return ApprovalFacts(
        id=row.id,
        type=stored.type,
        status=stored.status,
        payload=row.edited_payload if is_edited else row.payload,
        payload_sha256=current_hash(row),
        is_edited=is_edited,
        note=row.outcome_note,
        by=last["user_id"] if last is not None and row.status in ("approved", "rejected") else None,
        expires_at=row.expires_at,
        task_id=row.task_id,
        run_id=row.run_id,
        step=row.step,
        tool_call=msgspec.convert(row.tool_call, HeldToolCall) if row.tool_call is not None else None,
        is_new=is_new,
    )


def publish(
    kind: type[ApprovalEvent], row: Approval, by: str | None, /, cause: tuple[str, ...] | None = None, **fields: Any
) -> None:
    """Emit an event about an approval in its current state.

    `cause` lists the ids of the triggers and tasks that led to the task or the workflow run behind the event.
    """
    same = {name: getattr(row, name) for name in ApprovalEvent.__struct_fields__ if name not in ("approval_id", "by")}
    event = kind(approval_id=row.id, by=by, **same, **fields)
    emit(event, object=("approval", row.id), owner=row.owner_id, cause=cause)
