"""How a task looks to clients, and how it is encoded. A version never changes, so its encoding is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from corral.database.model import raw
from corral.database.statement import Statement
from corral.database.unit import current
from corral.errors import NotFound
from corral.http.answers import Encoded
from corral.schema.fields import Instant
from corral_plugins.tasks.api import RetryPolicy, ReviewPolicy, StallPolicy
from corral_plugins.tasks.models import PRIORITIES, TERMINAL, Task

CACHE_BYTES = 16 * 1024 * 1024
CACHED_BYTES_MAX = 16 * 1024
_SIZES = (1, 8, 64, 200)


class Cost(msgspec.Struct, kw_only=True):
    """What all attempts of a task cost. `unpriced_tokens` have no known price: they are not in `cost_usd`."""

    cost_usd: float
    unpriced_tokens: int
    input_tokens: int
    output_tokens: int
    calls: int


class TaskItem(msgspec.Struct, kw_only=True):
    """A task in a list: without `input` and `result`."""

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
    """A task. `warnings` only in answers to its creation and change."""

    input: dict[str, Any]
    result: Any
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


_NAMES = (
    "id",
    "version",
    "status",
    "title",
    "description",
    "instructions",
    "priority",
    "agent_id",
    "agent_role",
    "assigned_agent_id",
    "worker_id",
    "deadline",
    "required_tools",
    "allowed_tools",
    "depends_on",
    "parent_task_id",
    "depth",
    "available_at",
    "timeout_seconds",
    "queue_timeout_seconds",
    "max_cost_micro",
    "retry_policy",
    "stall_policy",
    "output_schema",
    "review_policy",
    "tags",
    "metadata",
    "attempt",
    "max_attempts",
    "fence",
    "reopened_count",
    "progress",
    "artifacts",
    "error",
    "cost_micro",
    "unpriced_tokens",
    "input_tokens",
    "output_tokens",
    "calls",
    "waiting_for",
    "source_type",
    "source_id",
    "cause_chain",
    "workflow_run_id",
    "step_run_id",
    "approval_id",
    "review_id",
    "dead_letter_id",
    "cancel_requested_at",
    "cancel_kind",
    "tainted",
    "created_by",
    "created_at",
    "updated_at",
    "queued_at",
    "assigned_at",
    "started_at",
    "finished_at",
)
FULL_NAMES = (*_NAMES, "input", "result")
_COLUMNS = [getattr(Task, name) for name in _NAMES]

_ONE = Statement(lambda p: Task.select(*_COLUMNS, Task.input, Task.result).where(Task.id == p("id")).tuples())
_VERSION = Statement(lambda p: Task.select(Task.version).where(Task.id == p("id")).tuples())
_STATUS = Statement(lambda p: Task.select(Task.status).where(Task.id == p("id")).tuples())


def _many(size: int) -> Statement:
    return Statement(lambda p: Task.select(*_COLUMNS).where(Task.id.in_([p(f"id{n}") for n in range(size)])).tuples())


_MANY = {size: _many(size) for size in _SIZES}


def encode_row(values: Sequence[Any], *, full: bool, warnings: Sequence[str] | None = None) -> bytes:
    """The JSON of a row of `_NAMES` (and `input`, `result` when `full`). JSON columns are not parsed."""
    (
        id_,
        version,
        status,
        title,
        description,
        instructions,
        priority,
        agent_id,
        agent_role,
        assigned,
        worker,
        deadline,
        required,
        allowed,
        depends,
        parent,
        depth,
        available,
        timeout,
        queue_timeout,
        max_cost,
        retry,
        stall,
        schema,
        review,
        tags,
        metadata,
        attempt,
        attempts,
        fence,
        reopened,
        progress,
        artifacts,
        error,
        cost,
        unpriced,
        tokens_in,
        tokens_out,
        calls,
        waiting,
        source_type,
        source_id,
        causes,
        run,
        step,
        approval,
        review_id,
        letter,
        cancel_at,
        cancel_kind,
        tainted,
        by,
        created,
        updated,
        queued,
        assigned_at,
        started,
        finished,
    ) = values[:58]
    common: dict[str, Any] = {
        "id": id_,
        "version": version,
        "status": status,
        "title": title,
        "description": description,
        "instructions": instructions,
        "priority": PRIORITIES[priority],
        "agent_id": agent_id,
        "agent_role": agent_role,
        "assigned_agent_id": assigned,
        "worker_id": worker,
        "deadline": deadline,
        "required_tools": Raw(required),
        "allowed_tools": raw(allowed),
        "depends_on": Raw(depends),
        "parent_task_id": parent,
        "depth": depth,
        "available_at": available,
        "timeout_seconds": timeout,
        "queue_timeout_seconds": queue_timeout,
        "max_cost_usd": None if max_cost is None else max_cost / 1e6,
        "retry_policy": raw(retry),
        "stall_policy": raw(stall),
        "output_schema": raw(schema),
        "review_policy": raw(review),
        "tags": Raw(tags),
        "metadata": Raw(metadata),
        "attempt": attempt,
        "max_attempts": attempts,
        "fence": fence,
        "reopened_count": reopened,
        "progress": raw(progress),
        "artifacts": Raw(artifacts),
        "error": raw(error),
        "cost": {
            "cost_usd": cost / 1e6,
            "unpriced_tokens": unpriced,
            "input_tokens": tokens_in,
            "output_tokens": tokens_out,
            "calls": calls,
        },
        "waiting_for": raw(waiting),
        "source": {"type": source_type, "id": source_id},
        "cause_chain": Raw(causes),
        "workflow_run_id": run,
        "step_run_id": step,
        "approval_id": approval,
        "review_id": review_id,
        "dead_letter_id": letter,
        "cancel_requested_at": cancel_at,
        "cancel_kind": cancel_kind,
        "tainted": bool(tainted),
        "created_by": by,
        "created_at": created,
        "updated_at": updated,
        "queued_at": queued,
        "assigned_at": assigned_at,
        "started_at": started,
        "finished_at": finished,
    }
    if full:
        common["input"] = Raw(values[58])
        common["result"] = raw(values[59])
        if warnings is not None:
            common["warnings"] = warnings
    return _encoder.encode(common)


_encoder = msgspec.json.Encoder()


class EncodingCache:
    """Encoded rows by id, each of one version. Filled by read units only: they see nothing that may be rolled back."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, bytes]] = {}
        self._size = 0
        self._lock = threading.Lock()

    def get(self, task_id: str, version: int) -> bytes | None:
        """The encoding of exactly this version."""
        found = self._kept.get(task_id)
        return found[1] if found is not None and found[0] == version else None

    def put(self, task_id: str, version: int, body: bytes) -> None:
        """Keep it, if it is small; the oldest go."""
        if len(body) > CACHED_BYTES_MAX or not current().read_only:
            return
        with self._lock:
            old = self._kept.pop(task_id, None)
            if old is not None:
                self._size -= len(old[1])
            self._kept[task_id] = (version, body)
            self._size += len(body)
            while self._size > CACHE_BYTES:
                first = next(iter(self._kept))
                self._size -= len(self._kept.pop(first)[1])


def read(task_id: str, warnings: Sequence[str] | None = None) -> bytes:
    """The encoded task; `NotFound`."""
    values = _ONE.one({"id": task_id})
    if values is None:
        raise NotFound()
    return encode_row(values, full=True, warnings=warnings)


def answer(task_id: str, version: int, *, status: int | None = None, warnings: Sequence[str] | None = None) -> Encoded:
    """The task as the answer of a change that left it at `version`."""
    return Encoded(read(task_id, warnings), task_id, version, status)


class Views:
    """Reads for clients. One a kernel, so that kernels of one process do not mix what they keep."""

    def __init__(self) -> None:
        self._tasks, self._items = EncodingCache(), EncodingCache()

    def one(self, task_id: str) -> Encoded:
        """The task; `NotFound`."""
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
            body = encode_row(values, full=True)
            self._tasks.put(task_id, version, body)
        return Encoded(body, task_id, version)

    @staticmethod
    def has_ended(task_id: str) -> bool:
        """Whether the task is in a terminal state; `NotFound`."""
        found = _STATUS.one({"id": task_id})
        if found is None:
            raise NotFound()
        return found[0] in TERMINAL

    def items(self, keys: Iterable[tuple[str, int]]) -> list[Any]:
        """The encoded list items of `(id, version)` pairs, in their order; what has gone meanwhile is left out."""
        wanted = list(keys)
        kept = self._items
        bodies = {task_id: kept.get(task_id, version) for task_id, version in wanted}
        missing = [task_id for task_id, body in bodies.items() if body is None]
        for values in self._rows(missing):
            body = encode_row(values, full=False)
            bodies[values[0]] = body
            kept.put(values[0], values[1], body)
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
