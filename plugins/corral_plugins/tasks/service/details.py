"""What hangs on one task: its attempts, comments, events and artifacts."""

from __future__ import annotations

from typing import Any

from corral.auth.principal import Principal
from corral.auth.visibility import can_read
from corral.database.model import SHARED
from corral.errors import NotFound
from corral.events.log import COLUMNS as EVENT_COLUMNS
from corral.events.log import EventRow, EventView, Record
from corral.http.page import Order, Page, PageQuery, paginate, read_cursor, write_cursor
from corral_plugins.tasks.models import Attempt, Comment, Task
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.shapes import AttemptView, CommentView

ATTEMPT_COLUMNS = [
    column
    for column in Attempt._meta.sorted_fields
    if column.name not in ("checkpoint", "result", "token_hash", "lease_id")
]


class Details:
    """Reads for clients; joins the caller's unit. `NotFound` for a task that the caller cannot see."""

    def attempts(self, task_id: str, query: PageQuery, caller: Principal) -> Page[AttemptView]:
        """One row a claim, oldest first."""
        readable(task_id, caller)
        select = Attempt.select(*ATTEMPT_COLUMNS).where(Attempt.task_id == task_id)
        order = (Order(Attempt.fence, descending=False),)
        return paginate(select, query, caller, scope=f"attempts:{task_id}", order=order, make=attempt_view)

    def attempt(self, task_id: str, fence: int, caller: Principal) -> AttemptView:
        """One claim."""
        readable(task_id, caller)
        where = (Attempt.task_id == task_id) & (Attempt.fence == fence)
        found = Attempt.select(*ATTEMPT_COLUMNS).where(where).first()
        if found is None:
            raise NotFound()
        return attempt_view(found)

    def comments(self, task_id: str, query: PageQuery, caller: Principal) -> Page[CommentView]:
        """Remarks, oldest first."""
        readable(task_id, caller)
        order = (Order(Comment.created_at, descending=False), Order(Comment.id, descending=False))
        return paginate(
            Comment.select().where(Comment.task_id == task_id),
            query,
            caller,
            scope=f"comments:{task_id}",
            order=order,
            make=lambda row: CommentView(
                id=row.id,
                author={"type": row.author_type, "id": row.author_id},
                body=row.body,
                created_at=row.created_at,
            ),
        )

    def events(self, task_id: str, query: PageQuery, caller: Principal) -> Page[EventView]:
        """The events of the task that the log still keeps, oldest first."""
        readable(task_id, caller)
        select = EventRow.select(EventRow.ins, *EVENT_COLUMNS).where(
            (EventRow.object_id == task_id) & EventRow.seq.is_null(False)
        )
        return paginate(
            select,
            query,
            caller,
            scope=f"events:{task_id}",
            order=(Order(EventRow.ins, descending=False),),
            make=lambda row: Record(*[getattr(row, column.name) for column in EVENT_COLUMNS]).view(),
        )

    def artifacts(self, task_id: str, query: PageQuery, caller: Principal) -> Page[dict[str, Any]]:
        """What the run made."""
        readable(task_id, caller)
        found = Task.select(Task.artifacts).where(Task.id == task_id).tuples().first()
        items: list[dict[str, Any]] = found[0] if found else []
        start = query.offset if isinstance(query.offset, int) else 0
        if isinstance(query.cursor, str):
            (start,) = read_cursor(query.cursor, f"artifacts:{task_id}", caller, query.fingerprint())
        end = start + query.limit
        following = (
            write_cursor(f"artifacts:{task_id}", caller, query.fingerprint(), [end]) if end < len(items) else None
        )
        offset = None if isinstance(query.cursor, str) else start
        return Page(items=items[start:end], total=len(items), limit=query.limit, offset=offset, next=following)


def readable(task_id: str, caller: Principal) -> rows.Row:
    """The task, if the caller may read it; `NotFound`. A worker reads what it holds."""
    row = rows.find(task_id)
    if row is None or not can_read(caller, SHARED, row.created_by):
        raise NotFound()
    if caller.kind == "worker" and not rows.is_held_by(row, caller.worker_id):
        raise NotFound()
    return row


def attempt_view(row: Any) -> AttemptView:
    """A ledger line for clients."""
    return AttemptView(
        id=row.id,
        fence=row.fence,
        n=row.n,
        counted=row.counted,
        worker_id=row.worker_id,
        agent_id=row.agent_id,
        agent_version=row.agent_version,
        model=row.model,
        status=row.status,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=row.error,
        usage={
            "input_tokens": row.input_tokens,
            "output_tokens": row.output_tokens,
            "calls": row.calls,
            "unpriced_tokens": row.unpriced_tokens,
        },
        cost_usd=row.cost_micro / 1e6,
        tainted=row.tainted,
        taint_sources=row.taint_sources or [],
    )
