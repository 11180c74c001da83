"""Rows of tasks and attempts, and the statements that read, lock and change them.

JSON columns are kept as text. Rules parse a column when they need its value, and views send the text unparsed.
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
"""The kinds of cancellation that end a task permanently. After any other kind, the task may be queued again."""
CAN_CONTINUE = Task.finished_at.is_null() & (Task.cancel_kind.is_null() | Task.cancel_kind.not_in(FINAL_CANCELLATIONS))
"""The condition that a task has not ended and was not permanently cancelled."""
PENDING = peewee.SQL("status = 'pending'")
QUEUED = peewee.SQL("status = 'pending' AND queue IS NOT NULL")
"""The condition that a task is in a queue.

It uses literals, because the planner uses a partial index only if the condition contains no parameters.
"""


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
    """Return the rows of an uncompiled query as tuples."""
    return list(query.tuples())


def tasks(condition: Any, limit: int) -> list[TaskRow]:
    """Lock and return at most `limit` tasks that match a condition.

    The query is not compiled, so use this function only for rare queries.
    """
    query = Task.select(*TASK_COLUMNS).where(condition).limit(limit)
    return [TaskRow(*values) for values in Statement(lambda p: locked(query).tuples()).rows({})]


def attempts(condition: Any, limit: int) -> list[AttemptRow]:
    """Return at most `limit` live attempts that match a condition, ordered by task."""
    live_ones = condition & Attempt.finished_at.is_null()
    query = Attempt.select(*ATTEMPT_COLUMNS).where(live_ones).order_by(Attempt.task_id).limit(limit)
    return [AttemptRow(*values) for values in Statement(lambda p: query.tuples()).rows({})]


def find(task_id: str) -> TaskRow | None:
    """Return the task without locking it, or None."""
    found = _TASK.one({"id": task_id})
    return None if found is None else TaskRow(*found)


def can_continue(row: TaskRow) -> bool:
    """Return whether a row that was read meets the condition `CAN_CONTINUE`."""
    return row.finished_at is None and row.cancel_kind not in FINAL_CANCELLATIONS


def is_held_by(row: TaskRow, worker_id: str | None) -> bool:
    """Return whether this worker holds the live lease of the task."""
    return row.lease_id is not None and row.worker_id == worker_id


def lock(task_id: str) -> TaskRow:
    """Return the task, locked until the unit of work ends. Raises `NotFound`."""
    found = _LOCK_TASK.one({"id": task_id})
    if found is None:
        raise NotFound()
    return TaskRow(*found)


def of_lease(lease_id: str) -> AttemptRow | None:
    """Return the attempt of a lease, whether the lease is live or not, or None."""
    found = _LEASE.one({"lease": lease_id})
    return None if found is None else AttemptRow(*found)


def live(task_id: str) -> AttemptRow | None:
    """Return the live attempt of a task, or None. The caller must lock the task first."""
    found = _LIVE.one({"task": task_id})
    return None if found is None else AttemptRow(*found)


def close(attempt: AttemptRow, status: str, *, by: str, error: str | None = None, result: str | None = None) -> bool:
    """End an attempt. Return False if the attempt has already ended. `error` and `result` are JSON text."""
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
    """Return the names of the model's JSON columns."""
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
    """Return the value as JSON text."""
    return msgspec.json.encode(value).decode()


def _as_columns(model: type[Model], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes with JSON columns converted to text. A string is taken as JSON text already."""
    names = json_columns(model)
    return {
        name: as_text(value) if name in names and value is not None and not isinstance(value, str) else value
        for name, value in changes.items()
    }


def extra_with(extra: str, changes: Mapping[str, Any]) -> str:
    """Return the JSON text of `extra` after these changes, without fields that have their default value."""
    fields: dict[str, Any] = msgspec.json.decode(extra, type=dict[str, msgspec.Raw])
    for name, value in changes.items():
        if value == EXTRA_DEFAULTS[name]:
            fields.pop(name, None)
        else:
            fields[name] = value
    return as_text(fields)


def change(row: TaskRow, changes: Mapping[str, Any]) -> None:
    """Change a task by one guarded update, and update `row` accordingly.

    Raises `Conflict` if the version or status of the task is no longer that of `row`, and `NotFound` if the task was
    deleted.
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
    """Change a live attempt by one guarded update. Return False if the attempt has ended."""
    values = _as_columns(Attempt, changes)
    changed = _update_attempt(tuple(values)).run({**values, "_id": attempt.id})
    _mirror(attempt, values)
    return changed == 1


def add_usage(attempt: AttemptRow, added: Mapping[str, int]) -> None:
    """Add usage to an attempt, whether it is live or not."""
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
    """Return the parsed value of a JSON column."""
    return None if text is None else msgspec.json.decode(text)
