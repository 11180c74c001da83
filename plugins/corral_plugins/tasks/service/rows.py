"""The statements that read, lock and change the rows of tasks and attempts, and the encoding of tasks for clients.

JSON columns are kept as text. The business rules parse a column only when they need its value, and responses contain
the text unparsed. The encoding of a task is cached by the task's version, because the content of a version never
changes.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import peewee
from msgspec import Raw

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import can_read
from corral.database.model import SHARED, JSONField, Model
from corral.database.statement import Parameter, Statement
from corral.database.unit import current, locked
from corral.errors import Conflict, NotFound
from corral.http.answers import Encoded
from corral_plugins.tasks.models import (
    EXTRA_DEFAULTS,
    PRIORITIES,
    TERMINAL,
    Attempt,
    AttemptRow,
    Task,
    TaskRow,
    deadline_of,
)
from corral_plugins.tasks.shapes import TaskCostSummary, TaskItem

TASK_COLUMNS = [getattr(Task, name) for name in TaskRow.__struct_fields__]
ATTEMPT_COLUMNS = [getattr(Attempt, name) for name in AttemptRow.__struct_fields__]


END_REPORTS = ("complete", "fail", "wait", "release", "cancelled")
"""The calls that a worker can use to end a lease."""
ASK_TOOL = "human.ask"
"""The tool whose call ends the lease of a run, because the task then waits for a person."""
MAX_SOURCES = 50
"""The maximum number of taint sources that a task keeps."""
FINAL_CANCELLATIONS = ("user", "parent")
"""The kinds of cancellation that end a task permanently. After any other kind, the task may be queued again."""
CAN_CONTINUE = Task.finished_at.is_null() & (Task.cancel_kind.is_null() | Task.cancel_kind.not_in(FINAL_CANCELLATIONS))
"""The SQL condition for tasks that have not ended and whose permanent cancellation has not been requested."""
PENDING = peewee.SQL("status = 'pending'")
QUEUED = peewee.SQL("status = 'pending' AND queue IS NOT NULL")
"""The SQL condition for tasks that are in a queue.

The condition uses literals because the query planner uses a partial index only for conditions without parameters.
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


def fetch_tuples(query: Any) -> list[tuple[Any, ...]]:
    """Run a query that is not a compiled `Statement`, and return its rows as tuples."""
    return list(query.tuples())


def lock_tasks(condition: Any, limit: int) -> list[TaskRow]:
    """Lock and return at most `limit` tasks that match a condition.

    The SQL text is generated again on every call, so use this function only for queries that run rarely.
    """
    query = Task.select(*TASK_COLUMNS).where(condition).limit(limit)
    return [TaskRow(*values) for values in Statement(lambda p: locked(query).tuples()).rows({})]


def find_live_attempts(condition: Any, limit: int) -> list[AttemptRow]:
    """Return at most `limit` live attempts that match a condition, ordered by task."""
    live_ones = condition & Attempt.finished_at.is_null()
    query = Attempt.select(*ATTEMPT_COLUMNS).where(live_ones).order_by(Attempt.task_id).limit(limit)
    return [AttemptRow(*values) for values in Statement(lambda p: query.tuples()).rows({})]


def find_task(task_id: str) -> TaskRow | None:
    """Return a task without locking it, or None if the task does not exist."""
    found = _TASK.one({"id": task_id})
    return None if found is None else TaskRow(*found)


def is_cancellable(row: TaskRow) -> bool:
    """Return whether the task has not ended and its permanent cancellation has not been requested.

    `CAN_CONTINUE` is the same condition in SQL.
    """
    return row.finished_at is None and row.cancel_kind not in FINAL_CANCELLATIONS


def is_held_by(row: TaskRow, worker_id: str | None) -> bool:
    """Return whether this worker holds the live lease of the task."""
    return row.lease_id is not None and row.worker_id == worker_id


def lock_task(task_id: str) -> TaskRow:
    """Lock a task until the unit of work ends, and return it. Raise `NotFound` if the task does not exist."""
    found = _LOCK_TASK.one({"id": task_id})
    if found is None:
        raise NotFound("There is no task with this id.")
    return TaskRow(*found)


def find_attempt(lease_id: str) -> AttemptRow | None:
    """Return the attempt of a lease, even if the lease has ended, or None if the lease does not exist."""
    found = _LEASE.one({"lease": lease_id})
    return None if found is None else AttemptRow(*found)


def find_live_attempt(task_id: str) -> AttemptRow | None:
    """Return the live attempt of a task, or None if it has none. The caller must lock the task first."""
    found = _LIVE.one({"task": task_id})
    return None if found is None else AttemptRow(*found)


def output_schema(row: TaskRow, attempt: AttemptRow | None) -> Any:
    """Return the JSON Schema of the result: the task's own schema, or else the schema of the attempt's agent.

    Return None if neither has a schema.
    """
    own = row.get("output_schema")
    return own if own is not None or attempt is None else parse_json_text(attempt.output_schema)


def close_attempt(
    attempt: AttemptRow, status: str, *, by: str, error: str | None = None, result: str | None = None
) -> bool:
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
def json_column_names(model: type[Model]) -> frozenset[str]:
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


def to_json_text(value: Any) -> str:
    """Return the value as JSON text."""
    return msgspec.json.encode(value).decode()


def _as_columns(model: type[Model], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes as column values, with the values of JSON columns converted to text.

    A string in a JSON column must already be JSON text.
    """
    names = json_column_names(model)
    return {
        name: to_json_text(value) if name in names and value is not None and not isinstance(value, str) else value
        for name, value in changes.items()
    }


def updated_extra(extra: str, changes: Mapping[str, Any]) -> str:
    """Return the JSON text of the `extra` column with the changes applied and default values left out."""
    fields: dict[str, Any] = msgspec.json.decode(extra, type=dict[str, msgspec.Raw])
    for name, value in changes.items():
        if value == EXTRA_DEFAULTS[name]:
            fields.pop(name, None)
        else:
            fields[name] = value
    return to_json_text(fields)


def change_task(row: TaskRow, changes: Mapping[str, Any]) -> None:
    """Change a task with a single conditional UPDATE, and update `row` accordingly.

    Raise `Conflict` if the stored version or status differs from `row`, and `NotFound` if the task was deleted.
    """
    columns: dict[str, Any] = {"updated_at": clock.now()}
    extra: dict[str, Any] = {}
    for name, value in changes.items():
        (extra if name in EXTRA_DEFAULTS else columns)[name] = value
    if extra:
        columns["extra"] = updated_extra(row.extra, extra)
    values = _as_columns(Task, columns)
    guard = {"_id": row.id, "_version": row.version, "_status": row.status}
    if not _update_task(tuple(values)).run({**values, **guard}):
        now = find_task(row.id)
        if now is None:
            raise NotFound("There is no task with this id.")
        raise Conflict(
            "The task was changed in the meantime; fetch it again and repeat the change.", current_status=now.status
        )
    row.version += 1
    _copy_to_struct(row, values)


def taint_task(row: TaskRow, sources: Sequence[str]) -> list[str]:
    """Mark a locked task as tainted by these sources. Return the task's taint sources, at most 50."""
    known: list[str] = row.get("taint_sources") or []
    all_sources = list(dict.fromkeys([*known, *sources]))[:MAX_SOURCES]
    if all_sources != known or not row.get("tainted"):
        change_task(row, {"tainted": True, "taint_sources": all_sources})
    return all_sources


def change_attempt(attempt: AttemptRow, **changes: Any) -> bool:
    """Change a live attempt with a single conditional UPDATE. Return False if the attempt has ended."""
    values = _as_columns(Attempt, changes)
    changed = _update_attempt(tuple(values)).run({**values, "_id": attempt.id})
    _copy_to_struct(attempt, values)
    return changed == 1


def add_usage(attempt: AttemptRow, added: Mapping[str, int]) -> None:
    """Add usage to an attempt, even if the attempt has ended."""
    Attempt.update({getattr(Attempt, name): getattr(Attempt, name) + n for name, n in added.items()}).where(
        Attempt.id == attempt.id
    ).execute()
    for name, n in added.items():
        setattr(attempt, name, getattr(attempt, name) + n)


def _copy_to_struct(struct: msgspec.Struct, values: Mapping[str, Any]) -> None:
    for name in struct.__struct_fields__:
        if name in values:
            setattr(struct, name, values[name])


def parse_json_text(text: str | None) -> Any:
    """Return the parsed value of a JSON column."""
    return None if text is None else msgspec.json.decode(text)


def find_readable_task(task_id: str, caller: Principal) -> TaskRow:
    """Return the task if the caller may read it, else raise `NotFound`.

    A worker may read the tasks whose leases it holds.
    """
    row = find_task(task_id)
    if row is None or not can_read(caller, SHARED, row.created_by):
        raise NotFound("There is no task with this id.")
    if caller.kind == "worker" and not is_held_by(row, caller.worker_id):
        raise NotFound("There is no task with this id.")
    return row


def lease_lost_error() -> Conflict:
    """Return the error for a lease that is not the live lease of its task."""
    return Conflict("This lease is no longer valid; stop the run and discard its results.", code="lease_lost")


# -- encoded for clients


CACHE_BYTES = 16 * 1024 * 1024
LARGEST_CACHED = 16 * 1024
_SIZES = (1, 8, 64, 200)


_COMPOSED = {
    "priority": ("priority",),
    "deadline": ("deadline_key",),
    "cost": (*TaskCostSummary.__struct_fields__[1:], "cost_micro"),
    "source": ("source_type", "source_id"),
}
"""The response fields of a task that are computed from columns with other names, each with its source columns."""
_STORED = frozenset(Task._meta.fields)
_SAME = [name for name in TaskItem.__struct_fields__ if name in _STORED and name not in _COMPOSED]
_same_values = operator.itemgetter(*_SAME)
_JSON = [name for name in _SAME if name in json_column_names(Task)]
_NAMES = (*_SAME, *(column for columns in _COMPOSED.values() for column in columns), "extra")
_TEMPLATE = {name: EXTRA_DEFAULTS.get(name) for name in TaskItem.__struct_fields__}
_COLUMNS = [getattr(Task, name) for name in _NAMES]

_ONE = Statement(lambda p: Task.select(*_COLUMNS, Task.input, Task.result).where(Task.id == p("id")).tuples())
_VERSION = Statement(lambda p: Task.select(Task.version).where(Task.id == p("id")).tuples())
_STATUS = Statement(lambda p: Task.select(Task.status).where(Task.id == p("id")).tuples())


def _select_items(size: int) -> Statement:
    return Statement(lambda p: Task.select(*_COLUMNS).where(Task.id.in_([p(f"id{n}") for n in range(size)])).tuples())


_MANY = {size: _select_items(size) for size in _SIZES}
_encode = msgspec.json.Encoder().encode
_decode_extra = msgspec.json.Decoder(dict[str, Raw]).decode


def encode_task(columns: Mapping[str, Any], *, full: bool, warnings: Sequence[str] | None = None) -> bytes:
    """Encode a task from the columns of its row, as a `TaskView` if `full` is set, else as a `TaskItem`.

    The text of JSON columns is copied unchanged.
    """
    view = _TEMPLATE | dict(zip(_SAME, _same_values(columns), strict=True))
    for name in _JSON:
        if view[name] is not None:
            view[name] = Raw(columns[name])
    view["priority"] = PRIORITIES[columns["priority"]]
    view["deadline"] = deadline_of(columns["deadline_key"])
    view["cost"] = {
        "cost_usd": columns["cost_micro"] / 1e6,
        "unpriced_tokens": columns["unpriced_tokens"],
        "input_tokens": columns["input_tokens"],
        "output_tokens": columns["output_tokens"],
        "calls": columns["calls"],
    }
    view["source"] = {"type": columns["source_type"], "id": columns["source_id"]}
    if columns["extra"] != "{}":
        view.update((name, value) for name, value in _decode_extra(columns["extra"]).items() if name in _TEMPLATE)
    if full:
        view["input"], result = Raw(columns["input"]), columns["result"]
        view["result"] = None if result is None else Raw(result)
        if warnings is not None:
            view["warnings"] = warnings
    return _encode(view)


def _encode_row(values: Sequence[Any], *, full: bool, warnings: Sequence[str] | None = None) -> bytes:
    names = (*_NAMES, "input", "result") if full else _NAMES
    return encode_task(dict(zip(names, values, strict=True)), full=full, warnings=warnings)


class EncodingCache:
    """A cache that contains at most one encoded version of each task.

    Only read-only units of work fill the cache, because they never see data that may still be rolled back.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}
        self._size = 0
        self._lock = threading.Lock()

    def get(self, task_id: str, version: int) -> bytes | None:
        """Return the encoding of exactly this version of the task, or None if it is not cached."""
        found = self._entries.get(task_id)
        return found[1] if found is not None and found[0] == version else None

    def get_all(self, keys: Iterable[tuple[str, int]]) -> dict[str, bytes | None]:
        """Return what `get` returns for each `(id, version)` pair, keyed by id."""
        find = self._entries.get
        return {
            task_id: found[1] if (found := find(task_id)) is not None and found[0] == version else None
            for task_id, version in keys
        }

    def store(self, task_id: str, version: int, body: bytes) -> None:
        """Cache the encoding if it is small. The oldest entries are evicted when the cache is full."""
        if len(body) > LARGEST_CACHED or not current().read_only:
            return
        with self._lock:
            old = self._entries.pop(task_id, None)
            if old is not None:
                self._size -= len(old[1])
            self._entries[task_id] = (version, body)
            self._size += len(body)
            while self._size > CACHE_BYTES:
                first = next(iter(self._entries))
                self._size -= len(self._entries.pop(first)[1])


def read_encoded_task(task_id: str, warnings: Sequence[str] | None = None) -> bytes:
    """Return the task encoded for clients. Raise `NotFound` if the task does not exist."""
    values = _ONE.one({"id": task_id})
    if values is None:
        raise NotFound("There is no task with this id.")
    return _encode_row(values, full=True, warnings=warnings)


def encoded_response(
    task_id: str, version: int, *, status: int | None = None, warnings: Sequence[str] | None = None
) -> Encoded:
    """Return a changed task as the response to the request that changed it.

    `version` is the version of the task after the change.
    """
    return Encoded(read_encoded_task(task_id, warnings), task_id, version, status)


class TaskViews:
    """Reads tasks for clients.

    There is one instance per kernel, so that kernels in the same process have separate caches.
    """

    def __init__(self) -> None:
        self._tasks, self._items = EncodingCache(), EncodingCache()

    def encoded_task(self, task_id: str) -> Encoded:
        """Return the task encoded for clients, from the cache if possible.

        Raise `NotFound` if the task does not exist.
        """
        found = _VERSION.one({"id": task_id})
        if found is None:
            raise NotFound("There is no task with this id.")
        version: int = found[0]
        body = self._tasks.get(task_id, version)
        if body is None:
            values = _ONE.one({"id": task_id})
            if values is None:
                raise NotFound("There is no task with this id.")
            version = values[1]
            body = _encode_row(values, full=True)
            self._tasks.store(task_id, version, body)
        return Encoded(body, task_id, version)

    @staticmethod
    def has_ended(task_id: str) -> bool:
        """Return whether the task has ended. Raise `NotFound` if the task does not exist."""
        found = _STATUS.one({"id": task_id})
        if found is None:
            raise NotFound("There is no task with this id.")
        return found[0] in TERMINAL

    def encoded_items(self, keys: Iterable[tuple[str, int]]) -> list[Any]:
        """Return the encoded list items for the `(id, version)` pairs, in the given order.

        Deleted tasks are omitted.
        """
        bodies = self._items.get_all(keys)
        for values in self._rows([task_id for task_id, body in bodies.items() if body is None]):
            bodies[values[0]] = body = _encode_row(values, full=False)
            self._items.store(values[0], values[1], body)
        return [Raw(body) for body in bodies.values() if body is not None]

    @staticmethod
    def _rows(ids: list[str]) -> list[tuple[Any, ...]]:
        if not ids:
            return []
        size = next((size for size in _SIZES if size >= len(ids)), None)
        if size is None:
            return [row for start in range(0, len(ids), 200) for row in TaskViews._rows(ids[start : start + 200])]
        padded = ids + [ids[-1]] * (size - len(ids))
        return _MANY[size].rows({f"id{n}": each for n, each in enumerate(padded)})
