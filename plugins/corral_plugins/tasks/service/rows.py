"""Rows of tasks and attempts, and the statements that read, lock and change them.

JSON columns stay text: rules parse them when they need the value, and views send them unparsed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.model import JSONField, Model
from corral.database.statement import Parameter, Statement
from corral.database.unit import locked
from corral.errors import Conflict, NotFound
from corral_plugins.tasks.models import EXTRA_DEFAULTS, Attempt, AttemptRow, Task, TaskRow

TASK_COLUMNS = [getattr(Task, name) for name in TaskRow.__struct_fields__]
ATTEMPT_COLUMNS = [getattr(Attempt, name) for name in AttemptRow.__struct_fields__]


FINAL_CANCELLATIONS = ("user", "parent")
"""Kinds of cancellation that end a task for good; after any other kind the task may be queued again."""
CAN_CONTINUE = Task.finished_at.is_null() & (Task.cancel_kind.is_null() | Task.cancel_kind.not_in(FINAL_CANCELLATIONS))
"""The task has not ended and was not cancelled for good."""
PENDING = peewee.SQL("status = 'pending'")
QUEUED = peewee.SQL("status = 'pending' AND queue IS NOT NULL")
"""Literals, because the planner uses a partial index only for a condition that it can see."""


_TASK = Statement(lambda p: Task.select(*TASK_COLUMNS).where(Task.id == p("id")).tuples())
_LOCK_TASK = Statement(lambda p: locked(Task.select(*TASK_COLUMNS).where(Task.id == p("id"))).tuples())
_LEASE = Statement(lambda p: Attempt.select(*ATTEMPT_COLUMNS).where(Attempt.lease_id == p("lease")).tuples())
_LIVE = Statement(
    lambda p: (
        Attempt.select(*ATTEMPT_COLUMNS).where((Attempt.task_id == p("task")) & Attempt.finished_at.is_null()).tuples()
    )
)
_CLOSE = Statement(
    lambda p: Attempt.update(
        {
            Attempt.finished_at: p("now"),
            Attempt.status: p("status"),
            Attempt.ended_by: p("by"),
            Attempt.error: p("error"),
            Attempt.counted: p("counted"),
            Attempt.result: p("result"),
        }
    ).where((Attempt.id == p("id")) & Attempt.finished_at.is_null())
)


def values(query: Any) -> list[tuple[Any, ...]]:
    """The rows of a query that is not compiled, as tuples."""
    return list(query.tuples())


def tasks(condition: Any, limit: int) -> list[TaskRow]:
    """At most `limit` tasks that meet a condition, locked. The query is not compiled: use it where it is rare."""
    query = Task.select(*TASK_COLUMNS).where(condition).limit(limit)
    return [TaskRow(*values) for values in Statement(lambda p: locked(query).tuples()).rows({})]


def attempts(condition: Any, limit: int) -> list[AttemptRow]:
    """At most `limit` live attempts that meet a condition, ordered by task."""
    live_ones = condition & Attempt.finished_at.is_null()
    query = Attempt.select(*ATTEMPT_COLUMNS).where(live_ones).order_by(Attempt.task_id).limit(limit)
    return [AttemptRow(*values) for values in Statement(lambda p: query.tuples()).rows({})]


def find(task_id: str) -> TaskRow | None:
    """The task, not locked."""
    found = _TASK.one({"id": task_id})
    return None if found is None else TaskRow(*found)


def can_continue(row: TaskRow) -> bool:
    """`CAN_CONTINUE` of a row that was read."""
    return row.finished_at is None and row.cancel_kind not in FINAL_CANCELLATIONS


def is_held_by(row: TaskRow, worker_id: str | None) -> bool:
    """Whether this worker has the live lease of the task."""
    return row.lease_id is not None and row.worker_id == worker_id


def lock(task_id: str) -> TaskRow:
    """The task, locked until the unit ends. Raises `NotFound`."""
    found = _LOCK_TASK.one({"id": task_id})
    if found is None:
        raise NotFound()
    return TaskRow(*found)


def of_lease(lease_id: str) -> AttemptRow | None:
    """The attempt of a lease, live or not."""
    found = _LEASE.one({"lease": lease_id})
    return None if found is None else AttemptRow(*found)


def live(task_id: str) -> AttemptRow | None:
    """The live attempt of a task; lock the task first."""
    found = _LIVE.one({"task": task_id})
    return None if found is None else AttemptRow(*found)


def close(attempt: AttemptRow, status: str, *, by: str, error: str | None = None, result: str | None = None) -> bool:
    """End an attempt. Returns False when it has ended already. `error` and `result` are JSON text."""
    now = clock.now()
    closed = _CLOSE.run(
        {
            "id": attempt.id,
            "now": now,
            "status": status,
            "by": by,
            "error": error,
            "result": result,
            "counted": attempt.counted,
        }
    )
    attempt.finished_at, attempt.status, attempt.ended_by = now, status, by
    return closed == 1


@functools.cache
def json_columns(model: type[Model]) -> frozenset[str]:
    """The names of the JSON columns."""
    return frozenset(field.name for field in model._meta.sorted_fields if isinstance(field, JSONField))


@functools.lru_cache(maxsize=512)
def _update_task(names: tuple[str, ...]) -> Statement:
    def build(p: Parameter) -> Any:
        changes: dict[Any, Any] = {getattr(Task, name): p(name) for name in names}
        return Task.update({**changes, Task.version: Task.version + 1}).where(
            (Task.id == p("_id")) & (Task.version == p("_version")) & (Task.status == p("_status"))
        )

    return Statement(build)


@functools.lru_cache(maxsize=512)
def _update_attempt(names: tuple[str, ...]) -> Statement:
    def build(p: Parameter) -> Any:
        changes: dict[Any, Any] = {getattr(Attempt, name): p(name) for name in names}
        return Attempt.update(changes).where((Attempt.id == p("_id")) & Attempt.finished_at.is_null())

    return Statement(build)


def as_text(value: Any) -> str:
    """The JSON text of a value."""
    return msgspec.json.encode(value).decode()


def _as_columns(model: type[Model], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes with JSON columns as text. A string is JSON text already."""
    names = json_columns(model)
    return {
        name: as_text(value) if name in names and value is not None and not isinstance(value, str) else value
        for name, value in changes.items()
    }


def extra_with(extra: str, changes: Mapping[str, Any]) -> str:
    """The JSON text of `extra` with these changes; a field that has its default is left out."""
    fields: dict[str, Any] = msgspec.json.decode(extra, type=dict[str, msgspec.Raw])
    for name, value in changes.items():
        if value == EXTRA_DEFAULTS[name]:
            fields.pop(name, None)
        else:
            fields[name] = value
    return as_text(fields)


def change(row: TaskRow, changes: Mapping[str, Any]) -> None:
    """Change a task by one guarded update, and `row` with it.

    Raises `Conflict` when the task is not in the version and status of `row` any more, `NotFound` when it is gone.
    """
    columns: dict[str, Any] = {"updated_at": clock.now()}
    extra: dict[str, Any] = {}
    for name, value in changes.items():
        (extra if name in EXTRA_DEFAULTS else columns)[name] = value
    if extra:
        columns["extra"] = extra_with(row.extra, extra)
    values = _as_columns(Task, columns)
    guard = {"_id": row.id, "_version": row.version, "_status": row.status}
    if not _update_task(tuple(values)).run({**values, **guard}):
        now = find(row.id)
        if now is None:
            raise NotFound()
        raise Conflict("The task was changed by someone else meanwhile.", current_status=now.status)
    row.version += 1
    _mirror(row, values)


def change_attempt(attempt: AttemptRow, **changes: Any) -> bool:
    """Change a live attempt by one guarded update. Returns False when it has ended."""
    values = _as_columns(Attempt, changes)
    changed = _update_attempt(tuple(values)).run({**values, "_id": attempt.id})
    _mirror(attempt, values)
    return changed == 1


def add_usage(attempt: AttemptRow, added: Mapping[str, int]) -> None:
    """Add usage to an attempt, live or not."""
    Attempt.update({getattr(Attempt, name): getattr(Attempt, name) + n for name, n in added.items()}).where(
        Attempt.id == attempt.id
    ).execute()
    for name, n in added.items():
        setattr(attempt, name, getattr(attempt, name) + n)


def _mirror(struct: msgspec.Struct, values: Mapping[str, Any]) -> None:
    for name in struct.__struct_fields__:
        if name in values:
            setattr(struct, name, values[name])


def parsed(text: str | None) -> Any:
    """The value of a JSON column."""
    return None if text is None else msgspec.json.decode(text)
