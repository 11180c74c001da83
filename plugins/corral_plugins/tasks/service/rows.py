"""Rows of tasks and attempts as the rules need them, and the statements that read, lock and change them.

JSON columns stay text here: they are parsed where a rule looks into them, and go out as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.model import JSONField, Model
from corral.database.statement import Parameter, Statement
from corral.database.unit import current, locked
from corral.errors import Conflict, NotFound
from corral_plugins.tasks.models import Attempt, Task


class TaskRow(msgspec.Struct):
    """A task, without its long texts. The fields are columns of `Task`, in this order."""

    id: str
    version: int
    status: str
    priority: int
    rank: int
    queue: str | None
    queue_key: str
    created_at: str
    created_by: str | None
    title: str
    agent_id: str | None
    agent_role: str | None
    assigned_agent_id: str | None
    worker_id: str | None
    lease_id: str | None
    deadline: str | None
    available_at: str
    timeout_seconds: int
    queue_timeout_seconds: int | None
    max_cost_micro: int | None
    attempt: int
    max_attempts: int
    fence: int
    reopened_count: int
    lost_in_row: int
    resuming: bool
    used_ms: int
    checkpoint_floor: int
    cost_micro: int
    unpriced_tokens: int
    input_tokens: int
    output_tokens: int
    calls: int
    cancel_kind: str | None
    cancel_reason: str | None
    cancel_requested_at: str | None
    failed_dependency_id: str | None
    queued_at: str | None
    queue_until: str | None
    started_at: str | None
    finished_at: str | None
    parent_task_id: str | None
    depth: int
    tainted: bool
    taint_sources: str | None
    waiting_kind: str | None
    waiting_until: str | None
    waiting_for: str | None
    resume: str | None
    error: str | None
    required_tools: str
    allowed_tools: str | None
    depends_on: str
    retry_policy: str | None
    stall_policy: str | None
    review_policy: str | None
    cause_chain: str
    output_schema: str | None


class AttemptRow(msgspec.Struct):
    """An attempt: one line of a task's ledger. The fields are columns of `Attempt`, in this order."""

    id: str
    task_id: str
    fence: int
    n: int
    counted: bool
    resumed: bool
    status: str
    worker_id: str
    agent_id: str
    agent_version: int
    requester_id: str | None
    lease_id: str
    lease_until: str
    ack_until: str | None
    timeout_at: str | None
    cancel_until: str | None
    last_activity_at: str
    progress_event_at: str | None
    stall_seconds: int
    loop_repeats: int
    stall_action: str
    stalled: bool
    signature: str | None
    signature_count: int
    log_bytes: int
    log_next: int
    cost_micro: int
    unpriced_tokens: int
    input_tokens: int
    output_tokens: int
    calls: int
    told: str | None
    stalls: int
    ended_by: str | None
    started_at: str | None
    finished_at: str | None
    checkpoint_step: int | None


TASK_COLUMNS = [getattr(Task, name) for name in TaskRow.__struct_fields__]
ATTEMPT_COLUMNS = [getattr(Attempt, name) for name in AttemptRow.__struct_fields__]


FOR_GOOD = ("user", "parent")
"""Kinds of cancellation after which a task does not go on; after the others it may be queued again."""
UNCANCELLED = Task.finished_at.is_null() & (Task.cancel_kind.is_null() | Task.cancel_kind.not_in(FOR_GOOD))
"""What has not ended and was not cancelled for good."""
PENDING = peewee.SQL("status = 'pending'")
"""As a literal: partial indexes are only used for conditions that the planner can see."""


def shared(query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
    """`FOR SHARE` where the engine has row locks: nobody changes the rows until the unit ends."""
    return query if current().database.kind == "sqlite" else query.for_update("FOR SHARE")  # type: ignore[arg-type]  # peewee takes the clause itself


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


def values(query: peewee.ModelSelect[Any]) -> list[tuple[Any, ...]]:
    """The rows of a query that is not hot, as tuples."""
    found: Any = query.tuples()
    return list(found)


def tasks(condition: Any, limit: int, *, order: Any = None) -> list[TaskRow]:
    """Tasks that meet a condition, locked; for what is not hot."""
    query = Task.select(*TASK_COLUMNS).where(condition).order_by(*([] if order is None else [order])).limit(limit)
    return [TaskRow(*values) for values in Statement(lambda p: locked(query).tuples()).rows({})]


def attempts(condition: Any, limit: int) -> list[AttemptRow]:
    """Live attempts that meet a condition, by task."""
    live_ones = condition & Attempt.finished_at.is_null()
    query = Attempt.select(*ATTEMPT_COLUMNS).where(live_ones).order_by(Attempt.task_id).limit(limit)
    return [AttemptRow(*values) for values in Statement(lambda p: query.tuples()).rows({})]


def find(task_id: str) -> TaskRow | None:
    """A task as it is."""
    found = _TASK.one({"id": task_id})
    return None if found is None else TaskRow(*found)


def is_uncancelled(row: TaskRow) -> bool:
    """`UNCANCELLED` of a row that was read."""
    return row.finished_at is None and row.cancel_kind not in FOR_GOOD


def is_held_by(row: TaskRow, worker_id: str | None) -> bool:
    """Whether this worker has the live lease of the task."""
    return row.lease_id is not None and row.worker_id == worker_id


def lock(task_id: str) -> TaskRow:
    """A task that nobody else changes until the unit ends; raises `NotFound`."""
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
    """End an attempt; False when it has ended already. `error` and `result` are JSON text."""
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
def _json_names(model: type[Model]) -> frozenset[str]:
    return frozenset(field.name for field in model._meta.sorted_fields if isinstance(field, JSONField))


@functools.lru_cache(maxsize=512)
def _update_task(names: tuple[str, ...]) -> Statement:
    def build(p: Parameter) -> peewee.Query:
        changes: dict[Any, Any] = {getattr(Task, name): p(name) for name in names}
        return Task.update({**changes, Task.version: Task.version + 1}).where(
            (Task.id == p("_id")) & (Task.version == p("_version")) & (Task.status == p("_status"))
        )

    return Statement(build)


@functools.lru_cache(maxsize=512)
def _update_attempt(names: tuple[str, ...]) -> Statement:
    def build(p: Parameter) -> peewee.Query:
        changes: dict[Any, Any] = {getattr(Attempt, name): p(name) for name in names}
        return Attempt.update(changes).where((Attempt.id == p("_id")) & Attempt.finished_at.is_null())

    return Statement(build)


def as_text(model: type[Model], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes with JSON columns as text; text is taken to be JSON already."""
    names = _json_names(model)
    return {
        name: msgspec.json.encode(value).decode()
        if name in names and value is not None and not isinstance(value, str)
        else value
        for name, value in changes.items()
    }


def change(row: TaskRow, changes: Mapping[str, Any]) -> None:
    """One guarded update of a task: it must still be what `row` says. `row` is changed with it."""
    values = as_text(Task, {"updated_at": clock.now(), **changes})
    guard = {"_id": row.id, "_version": row.version, "_status": row.status}
    if not _update_task(tuple(values)).run({**values, **guard}):
        now = find(row.id)
        if now is None:
            raise NotFound()
        raise Conflict("The task was changed by someone else meanwhile.", current_status=now.status)
    row.version += 1
    _mirror(row, values)


def change_attempt(attempt: AttemptRow, **changes: Any) -> bool:
    """One guarded update of a live attempt; False when it has ended."""
    values = as_text(Attempt, changes)
    changed = _update_attempt(tuple(values)).run({**values, "_id": attempt.id})
    _mirror(attempt, values)
    return changed == 1


def add_usage(attempt: AttemptRow, grown: Mapping[str, int]) -> None:
    """Add what an attempt, live or not, has used more."""
    Attempt.update({getattr(Attempt, name): getattr(Attempt, name) + n for name, n in grown.items()}).where(
        Attempt.id == attempt.id
    ).execute()
    for name, n in grown.items():
        setattr(attempt, name, getattr(attempt, name) + n)


def _mirror(struct: msgspec.Struct, values: Mapping[str, Any]) -> None:
    names: Iterable[str] = struct.__struct_fields__
    for name in names:
        if name in values:
            setattr(struct, name, values[name])


def parsed(text: str | None) -> Any:
    """The value of a JSON column."""
    return None if text is None else msgspec.json.decode(text)
