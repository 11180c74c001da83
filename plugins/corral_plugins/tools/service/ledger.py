"""The rows of calls. Every transition is one guarded update; who loses has no effect."""

from __future__ import annotations

from typing import Any, cast

import peewee

from corral import clock
from corral.errors import NotFound
from corral.events.event import emit
from corral.ids import new_id
from corral_plugins.tools.models import ToolCall
from corral_plugins.tools.shapes import CallView, Decision, Status, ToolCalled

ALIVE_SECONDS = 15
"""So long after its last sign of life a process that runs a call is taken for dead."""
AT_ONCE = 200

OPEN = peewee.SQL("status IN ('running', 'permitted')")
"""As a literal: partial indexes are only used for conditions that the planner can see."""


def find(task_id: str, call_id: str) -> ToolCall | None:
    """A call; lock its task first."""
    row: ToolCall | None = ToolCall.get_or_none((ToolCall.task_id == task_id) & (ToolCall.call_id == call_id))
    return row


def by_id(row_id: str) -> ToolCall:
    """A call by the id of its row; `NotFound` when its task was deleted meanwhile."""
    row: ToolCall | None = ToolCall.get_or_none(ToolCall.id == row_id)
    if row is None:
        raise NotFound("The task of this call was deleted.")
    return row


def insert(**values: Any) -> ToolCall:
    """A new call."""
    row = ToolCall(id=new_id(), created_at=clock.now(), **values)
    ToolCall.insert(row.__data__).execute()
    return row


def change(row: ToolCall, **values: Any) -> bool:
    """Write, if the call is still in the state and execution that `row` says; `row` is changed with it."""
    same = (ToolCall.id == row.id) & (ToolCall.status == row.status) & (ToolCall.executions == row.executions)
    if not ToolCall.update(**values).where(same).execute():
        return False
    for name, value in values.items():
        setattr(row, name, value)
    return True


def end(
    row: ToolCall,
    status: str,
    *,
    result: Any = None,
    error: dict[str, Any] | None = None,
    duration_ms: int | None = None,
    tainted: bool = False,
) -> bool:
    """End a call, and tell so; False when it has ended or another process has it."""
    now = clock.now()
    took = duration_ms if duration_ms is not None else clock.elapsed_ms(row.created_at, now)
    ended = change(
        row,
        status=status,
        result=result,
        error=error,
        finished_at=now,
        duration_ms=took,
        alive_until=None,
        tainted=bool(row.tainted) or tainted,
    )
    if ended:
        tell(row)
    return ended


def tell(row: ToolCall) -> None:
    """Emit that a call has ended."""
    event = ToolCalled(
        task_id=row.task_id,
        call_id=row.call_id,
        tool=row.tool,
        decision=row.decision,
        status=row.status,
        duration_ms=row.duration_ms,
    )
    emit(event, object=("task", row.task_id), owner=row.requester_id)


def keep_alive(row_id: str, executions: int) -> None:
    """The process that runs a call lives."""
    mine = (ToolCall.id == row_id) & (ToolCall.status == "running") & (ToolCall.executions == executions)
    ToolCall.update(alive_until=clock.now(ALIVE_SECONDS)).where(mine).execute()


def count(task_id: str, fence: int) -> tuple[int, int]:
    """Calls of an attempt, and calls of its task that run now."""
    calls = ToolCall.select().where((ToolCall.task_id == task_id) & (ToolCall.fence == fence)).count()
    is_alive = OPEN & (ToolCall.alive_until >= clock.now())
    running = ToolCall.select().where((ToolCall.task_id == task_id) & is_alive).count()
    return int(calls), int(running)


def denials(task_id: str, fence: int) -> int:
    """Refused calls of an attempt. Arguments that did not match are not counted: models mend those."""
    refused = (ToolCall.decision == "denied") & (ToolCall.reason != "invalid_arguments")
    return int(ToolCall.select().where((ToolCall.task_id == task_id) & (ToolCall.fence == fence) & refused).count())


def abandoned() -> list[ToolCall]:
    """Calls whose process or permit is over, the oldest first; at most 200."""
    is_over = OPEN & (ToolCall.alive_until < clock.now())
    return list(ToolCall.select().where(is_over).order_by(ToolCall.alive_until).limit(AT_ONCE))


def delete_older(days: int, limit: int) -> int:
    """Delete old calls; how many."""
    old = ToolCall.select(ToolCall.id).where(ToolCall.created_at < clock.now(-days * 86_400)).limit(limit)
    return int(ToolCall.delete().where(ToolCall.id.in_(old)).execute())


def delete_of(task_id: str, limit: int) -> int:
    """Delete calls of a task; how many."""
    some = ToolCall.select(ToolCall.id).where(ToolCall.task_id == task_id).limit(limit)
    return int(ToolCall.delete().where(ToolCall.id.in_(some)).execute())


def view(row: ToolCall) -> CallView:
    """A call as clients see it."""
    return CallView(
        id=row.id,
        call_id=row.call_id,
        task_id=row.task_id,
        attempt=row.fence,
        agent_id=row.agent_id,
        tool=row.tool,
        arguments=row.arguments,
        arguments_sha256=row.arguments_sha256,
        decision=cast(Decision, row.decision),
        reason=row.reason,
        status=cast(Status, row.status),
        result=row.result,
        error=row.error,
        tainted=bool(row.tainted),
        started_at=row.created_at,
        finished_at=row.finished_at,
        duration_ms=row.duration_ms,
    )
