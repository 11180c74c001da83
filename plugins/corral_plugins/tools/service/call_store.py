"""Reads and writes the rows of tool calls.

Every status change is a single conditional UPDATE, which changes nothing if another process changed the row first.
Results are stored as JSON of at most 64 KiB.
"""

from __future__ import annotations

from typing import Any

import msgspec
import peewee

from corral import clock
from corral.errors import NotFound
from corral.events.event import emit
from corral.ids import new_id
from corral_plugins.tools.api import ToolCalled
from corral_plugins.tools.models import ToolCallRow
from corral_plugins.tools.shapes import ToolCallView

LIMIT = 64 * 1024
NOTE = " [truncated: {omitted} of {size} bytes are omitted{file}]"

_encode = msgspec.json.Encoder().encode


def to_json(value: Any) -> Any:
    """Convert a value, such as a struct, into plain JSON values."""
    return msgspec.json.decode(_encode(value))


def is_long_output(value: Any) -> bool:
    """Return whether `truncate_output` would truncate the value."""
    return len(_encode(value)) > LIMIT


def truncate_output(value: Any, limit: int = LIMIT, *, file_id: str | None = None) -> Any:
    """Truncate a value so that its JSON has at most `limit` bytes.

    If the value is an object, its longest strings are truncated. If that is not enough, or if the value is a list, the
    whole JSON becomes one truncated string. A note replaces the removed text. The note names the file with the whole
    value, if there is such a file.
    """
    size = len(_encode(value))
    if size <= limit:
        return value
    note = NOTE if file_id is None else NOTE.replace("{file}", f"; the whole result is the file {file_id}")
    if isinstance(value, str):
        return _truncate_text(value, limit, size, note)
    if isinstance(value, dict):
        shorter = dict(value)
        for name in sorted(
            (key for key in shorter if isinstance(shorter[key], str)), key=lambda key: -len(shorter[key])
        ):
            excess = len(_encode(shorter)) - limit
            if excess <= 0:
                break
            length = len(_encode(shorter[name]))
            shorter[name] = _truncate_text(shorter[name], max(200, length - excess), length, note)
        if len(_encode(shorter)) <= limit:
            return shorter
    return {"cut": _truncate_text(_encode(value).decode(), limit - 16, size, note)}


def _truncate_text(text: str, limit: int, size: int, wording: str) -> str:
    """Truncate a string and append a note about the truncation. The JSON of the result has at most `limit` bytes."""
    note = wording.format(omitted=size, size=size, file="")
    kept = text.encode()[: max(0, limit - len(note) - 2)].decode(errors="ignore")
    while len(_encode(kept)) > max(2, limit - len(note)):  # escape sequences make the JSON longer than the text
        kept = kept[: len(kept) * 3 // 4]
    return kept + wording.format(omitted=size - len(kept.encode()), size=size, file="")


# -- rows


_SHOWN = [name for name in ToolCallView.__struct_fields__ if name in ToolCallRow._meta.fields]

ALIVE_SECONDS = 15
"""The number of seconds without a sign of life after which the process of a call is considered to have stopped."""
ABANDONED_LIMIT = 200

OPEN = peewee.SQL("status IN ('running', 'permitted')")
"""The SQL condition for calls that have not ended.

The statuses are literals, because query planners do not use a partial index for a condition with parameters.
"""


def find_call(task_id: str, call_id: str) -> ToolCallRow | None:
    """Return a call, or None if it does not exist. Callers must lock the task first."""
    row: ToolCallRow | None = ToolCallRow.get_or_none(
        (ToolCallRow.task_id == task_id) & (ToolCallRow.call_id == call_id)
    )
    return row


def find_call_by_id(row_id: str) -> ToolCallRow:
    """Return the call with this row id. Raise `NotFound` if the task was deleted."""
    row: ToolCallRow | None = ToolCallRow.get_or_none(ToolCallRow.id == row_id)
    if row is None:
        raise NotFound("The task of this call was deleted.")
    return row


def insert_call(**values: Any) -> ToolCallRow:
    """Insert a tool call and return the row."""
    row = ToolCallRow(**{"id": new_id(), "created_at": clock.now(), **values})
    ToolCallRow.insert(row.__data__).execute()
    return row


def update_call_row(row: ToolCallRow, **values: Any) -> bool:
    """Update a call in the database and in `row`. Return whether the call was updated.

    Nothing is updated if the status or `executions` of the call has changed since `row` was read.
    """
    unchanged = (
        (ToolCallRow.id == row.id) & (ToolCallRow.status == row.status) & (ToolCallRow.executions == row.executions)
    )
    if not ToolCallRow.update(**values).where(unchanged).execute():
        return False
    for name, value in values.items():
        setattr(row, name, value)
    return True


def end_call(
    row: ToolCallRow,
    status: str,
    *,
    result: Any = None,
    error: dict[str, Any] | None = None,
    duration_ms: int | None = None,
    tainted: bool = False,
    reason: str | None = None,
    causes: tuple[str, ...] = (),
) -> bool:
    """End a call and publish the `tool.called` event.

    `reason` is the reason why a call that needed an approval did not run. `causes` lists the ids of
    the triggers and tasks that led to the task; by default, the event has the causes of the unit of work. Return False
    if the call has already ended or another process has taken over the call.
    """
    now = clock.now()
    duration = duration_ms if duration_ms is not None else clock.elapsed_ms(row.created_at, now)
    ended = update_call_row(
        row,
        status=status,
        result=result,
        error=error,
        finished_at=now,
        duration_ms=duration,
        alive_until=None,
        tainted=bool(row.tainted) or tainted,
        reason=row.reason if reason is None else reason,
        held_arguments=None,
    )
    if ended:
        publish_call(row, causes)
    return ended


def publish_call(row: ToolCallRow, causes: tuple[str, ...] = ()) -> None:
    """Emit the `tool.called` event for an ended call.

    The event has the given `causes` or, if there are none, the causes of the unit of work.
    """
    event = ToolCalled(
        task_id=row.task_id,
        call_id=row.call_id,
        tool=row.tool,
        decision=row.decision,
        status=row.status,
        duration_ms=row.duration_ms,
    )
    emit(event, object=("task", row.task_id), owner=row.requester_id, cause=causes or None)


def record_alive(row_id: str, executions: int) -> None:
    """Set `alive_until` of a running call to `ALIVE_SECONDS` from now, because its process is still alive."""
    mine = (ToolCallRow.id == row_id) & (ToolCallRow.status == "running") & (ToolCallRow.executions == executions)
    ToolCallRow.update(alive_until=clock.now(ALIVE_SECONDS)).where(mine).execute()


def count_calls(task_id: str, fence: int) -> tuple[int, int]:
    """Return the number of calls in an attempt, and the number of running or permitted calls of the attempt's task.

    The second number excludes abandoned calls.
    """
    calls = ToolCallRow.select().where((ToolCallRow.task_id == task_id) & (ToolCallRow.fence == fence)).count()
    is_alive = OPEN & (ToolCallRow.alive_until >= clock.now())
    running = ToolCallRow.select().where((ToolCallRow.task_id == task_id) & is_alive).count()
    return int(calls), int(running)


def count_denials(task_id: str, fence: int) -> int:
    """Count the denied calls of an attempt.

    Calls with invalid arguments are not counted, because the model can correct the arguments and repeat the call.
    """
    denied = (ToolCallRow.decision == "denied") & (ToolCallRow.reason != "invalid_arguments")
    return int(
        ToolCallRow.select().where((ToolCallRow.task_id == task_id) & (ToolCallRow.fence == fence) & denied).count()
    )


def has_abandoned_calls() -> bool:
    """Return whether there are abandoned calls.

    A call is abandoned if its process has stopped, or if the worker did not report the outcome in time.
    """
    return bool(ToolCallRow.select().where(OPEN & (ToolCallRow.alive_until < clock.now())).limit(1).exists())


def abandoned_calls() -> list[ToolCallRow]:
    """List at most 200 abandoned calls, oldest first.

    A call is abandoned if its process has stopped, or if the worker did not report the outcome in time.
    """
    is_abandoned = OPEN & (ToolCallRow.alive_until < clock.now())
    return list(ToolCallRow.select().where(is_abandoned).order_by(ToolCallRow.alive_until).limit(ABANDONED_LIMIT))


def delete_older_calls(days: int, limit: int) -> int:
    """Delete at most `limit` calls that are older than `days` days. Return the number of deleted calls."""
    old = ToolCallRow.select(ToolCallRow.id).where(ToolCallRow.created_at < clock.now(-days * 86_400)).limit(limit)
    return int(ToolCallRow.delete().where(ToolCallRow.id.in_(old)).execute())


def delete_calls_of_task(task_id: str, limit: int) -> int:
    """Delete at most `limit` calls of a task. Return the number of deleted calls."""
    some = ToolCallRow.select(ToolCallRow.id).where(ToolCallRow.task_id == task_id).limit(limit)
    return int(ToolCallRow.delete().where(ToolCallRow.id.in_(some)).execute())


def call_view(row: ToolCallRow) -> ToolCallView:
    """Convert a row into the response body for a tool call."""
    shown: dict[str, Any] = {name: getattr(row, name) for name in _SHOWN}
    return ToolCallView(**shown, attempt=row.fence, started_at=row.created_at)
