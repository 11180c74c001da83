"""API representations of tasks, and their encoding.

A version of a task never changes, so its encoding is cached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from corral.database.statement import Statement
from corral.database.unit import current
from corral.errors import NotFound
from corral.http.answers import Encoded
from corral.schema.fields import Instant
from corral_plugins.tasks.api import RetryPolicy, ReviewPolicy, StallPolicy
from corral_plugins.tasks.models import EXTRA_DEFAULTS, PRIORITIES, TERMINAL, Task, deadline_of
from corral_plugins.tasks.service import rows

CACHE_BYTES = 16 * 1024 * 1024
LARGEST_CACHED = 16 * 1024
_SIZES = (1, 8, 64, 200)


class Cost(msgspec.Struct, kw_only=True):
    """The cost of all attempts of a task. `unpriced_tokens` have no known price and are not included in `cost_usd`."""

    cost_usd: float
    unpriced_tokens: int
    input_tokens: int
    output_tokens: int
    calls: int


class TaskItem(msgspec.Struct, kw_only=True):
    """A task in a list, without `input` and `result`."""

    id: str
    version: int
    status: str
    title: str
    description: str
    instructions: str
    priority: str
    agent_id: str | None
    agent_role: str | None
    assigned_agent_id: str | None
    worker_id: str | None
    deadline: Instant | None
    required_tools: list[str]
    allowed_tools: list[str] | None
    depends_on: list[str]
    parent_task_id: str | None
    depth: int
    available_at: Instant
    timeout_seconds: int
    queue_timeout_seconds: int | None
    max_cost_usd: float | None
    retry_policy: RetryPolicy | None
    stall_policy: StallPolicy | None
    output_schema: dict[str, Any] | None
    review_policy: ReviewPolicy | None
    tags: list[str]
    metadata: dict[str, Any]
    attempt: int
    max_attempts: int
    fence: int
    reopened_count: int
    progress: dict[str, Any] | None
    artifacts: list[Any]
    error: dict[str, Any] | None
    cost: Cost
    waiting_for: dict[str, Any] | None
    source: dict[str, Any]
    cause_chain: list[str]
    workflow_run_id: str | None
    step_run_id: str | None
    approval_id: str | None
    review_id: str | None
    dead_letter_id: str | None
    cancel_requested_at: Instant | None
    cancel_kind: str | None
    tainted: bool
    created_by: str | None
    created_at: Instant
    updated_at: Instant
    queued_at: Instant | None
    assigned_at: Instant | None
    started_at: Instant | None
    finished_at: Instant | None


class TaskView(TaskItem, kw_only=True):
    """A task. `warnings` is present only in the responses to its creation and to changes."""

    input: dict[str, Any]
    result: Any
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


_COMPOSED = {
    "priority": ("priority",),
    "deadline": ("deadline_key",),
    "cost": (*Cost.__struct_fields__[1:], "cost_micro"),
    "source": ("source_type", "source_id"),
}
"""The fields of the view that are computed from other columns."""
_STORED = frozenset(Task._meta.fields)
_SAME = [name for name in TaskItem.__struct_fields__ if name in _STORED and name not in _COMPOSED]
_JSON = [name for name in _SAME if name in rows.json_columns(Task)]
_NAMES = (*_SAME, *(column for columns in _COMPOSED.values() for column in columns), "extra")
_TEMPLATE = {name: EXTRA_DEFAULTS.get(name) for name in TaskItem.__struct_fields__}
_COLUMNS = [getattr(Task, name) for name in _NAMES]

_ONE = Statement(lambda p: Task.select(*_COLUMNS, Task.input, Task.result).where(Task.id == p("id")).tuples())
_VERSION = Statement(lambda p: Task.select(Task.version).where(Task.id == p("id")).tuples())
_STATUS = Statement(lambda p: Task.select(Task.status).where(Task.id == p("id")).tuples())


def _many(size: int) -> Statement:
    return Statement(lambda p: Task.select(*_COLUMNS).where(Task.id.in_([p(f"id{n}") for n in range(size)])).tuples())


_MANY = {size: _many(size) for size in _SIZES}
_encode = msgspec.json.Encoder().encode
_decode_extra = msgspec.json.Decoder(dict[str, Raw]).decode


def encode(columns: Mapping[str, Any], *, full: bool, warnings: Sequence[str] | None = None) -> bytes:
    """Return the JSON of a `TaskView` if `full` is set, else of a `TaskItem`, from the columns of its row.

    JSON columns are copied as they are stored.
    """
    view = _TEMPLATE.copy()
    for name in _SAME:
        view[name] = columns[name]
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


def _encode_tuple(values: Sequence[Any], *, full: bool, warnings: Sequence[str] | None = None) -> bytes:
    names = (*_NAMES, "input", "result") if full else _NAMES
    return encode(dict(zip(names, values, strict=True)), full=full, warnings=warnings)


class EncodingCache:
    """A cache of encoded tasks by id, with one version per task.

    Only read units of work fill the cache, because they never see data that may be rolled back.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}
        self._size = 0
        self._lock = threading.Lock()

    def get(self, task_id: str, version: int) -> bytes | None:
        """Return the encoding of exactly this version, or None."""
        found = self._entries.get(task_id)
        return found[1] if found is not None and found[0] == version else None

    def put(self, task_id: str, version: int, body: bytes) -> None:
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


def read(task_id: str, warnings: Sequence[str] | None = None) -> bytes:
    """Return the encoded task. Raises `NotFound`."""
    values = _ONE.one({"id": task_id})
    if values is None:
        raise NotFound()
    return _encode_tuple(values, full=True, warnings=warnings)


def answer(task_id: str, version: int, *, status: int | None = None, warnings: Sequence[str] | None = None) -> Encoded:
    """Return the response to a change that left the task at `version`."""
    return Encoded(read(task_id, warnings), task_id, version, status)


class Views:
    """Reads tasks for clients.

    There is one instance per kernel, so that kernels in the same process have separate caches.
    """

    def __init__(self) -> None:
        self._tasks, self._items = EncodingCache(), EncodingCache()

    def one(self, task_id: str) -> Encoded:
        """Return the encoded task, from the cache if possible. Raises `NotFound`."""
        found = _VERSION.one({"id": task_id})
        if found is None:
            raise NotFound()
        version: int = found[0]
        body = self._tasks.get(task_id, version)
        if body is None:
            values = _ONE.one({"id": task_id})
            if values is None:
                raise NotFound()
            version = values[1]
            body = _encode_tuple(values, full=True)
            self._tasks.put(task_id, version, body)
        return Encoded(body, task_id, version)

    @staticmethod
    def has_ended(task_id: str) -> bool:
        """Return whether the task has ended. Raises `NotFound`."""
        found = _STATUS.one({"id": task_id})
        if found is None:
            raise NotFound()
        return found[0] in TERMINAL

    def items(self, keys: Iterable[tuple[str, int]]) -> list[Any]:
        """Return the encoded list items for the `(id, version)` pairs, in the given order.

        Deleted tasks are omitted.
        """
        wanted = list(keys)
        cache = self._items
        bodies = {task_id: cache.get(task_id, version) for task_id, version in wanted}
        missing = [task_id for task_id, body in bodies.items() if body is None]
        for values in self._rows(missing):
            body = _encode_tuple(values, full=False)
            bodies[values[0]] = body
            cache.put(values[0], values[1], body)
        return [Raw(body) for body in bodies.values() if body is not None]

    @staticmethod
    def _rows(ids: list[str]) -> list[tuple[Any, ...]]:
        if not ids:
            return []
        size = next((size for size in _SIZES if size >= len(ids)), None)
        if size is None:
            return [row for start in range(0, len(ids), 200) for row in Views._rows(ids[start : start + 200])]
        padded = ids + [ids[-1]] * (size - len(ids))
        return _MANY[size].rows({f"id{n}": each for n, each in enumerate(padded)})
