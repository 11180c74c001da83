"""The database tables for tasks. Only this plugin's service modules write to them.

`TaskRow` and `AttemptRow` declare the columns that the business rules read. `TaskViewColumns` and `AttemptViewColumns`
declare the columns that only views, claims and authentication read. The models, the compiled statements and the views
are generated from these declarations.
"""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

import msgspec
import peewee
from peewee import SQL

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model

PRIORITIES = ("low", "medium", "high", "critical")
STATUSES = ("blocked", "pending", "assigned", "running", "waiting", "cancelling", "completed", "failed", "cancelled")
TERMINAL = ("completed", "failed", "cancelled")
NO_DEADLINE = "9999-12-31T23:59:59.999Z"


class ColumnDeclaration:
    """Declares how a field is stored: its column type and the column's options."""

    def __init__(self, kind: type[peewee.Field], **options: Any) -> None:
        self.kind, self.options = kind, options


class TaskRow(msgspec.Struct):
    """The columns of a task that the business rules read.

    `queue_key` names the task's queue: `agent:<id>`, `role:<role>` or `any`, followed by `#<digest>` if the task
    requires tools. `queue` equals `queue_key` while the task can be claimed. It is null until the task is available,
    and `held` while the requester is not active. `rank` is the priority plus a bonus that grows with the waiting time.
    `lease_id` is the id of the live lease. Amounts of money are in micro-USD. `extra` is a JSON object that contains
    the rarely set fields listed in `EXTRA_DEFAULTS`.
    """

    id: Annotated[str, ColumnDeclaration(IdField, primary_key=True)]
    version: Annotated[int, ColumnDeclaration(peewee.IntegerField, default=1)]
    status: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=12)]
    priority: Annotated[int, ColumnDeclaration(peewee.SmallIntegerField)]
    rank: Annotated[int, ColumnDeclaration(peewee.SmallIntegerField)]
    queue: Annotated[str | None, ColumnDeclaration(peewee.CharField, max_length=140, null=True)]
    queue_key: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=140)]
    deadline_key: Annotated[str, ColumnDeclaration(InstantField, default=NO_DEADLINE)]
    created_at: Annotated[str, ColumnDeclaration(InstantField)]
    created_by: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    title: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=200)]
    agent_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    agent_role: Annotated[str | None, ColumnDeclaration(peewee.CharField, max_length=64, null=True)]
    assigned_agent_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    worker_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    lease_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    available_at: Annotated[str, ColumnDeclaration(InstantField)]
    timeout_seconds: Annotated[int, ColumnDeclaration(peewee.IntegerField)]
    queue_until: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    attempt: Annotated[int, ColumnDeclaration(peewee.IntegerField, default=0)]
    max_attempts: Annotated[int, ColumnDeclaration(peewee.IntegerField)]
    fence: Annotated[int, ColumnDeclaration(peewee.IntegerField, default=0)]
    cost_micro: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    unpriced_tokens: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    input_tokens: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    output_tokens: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    calls: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    cancel_kind: Annotated[str | None, ColumnDeclaration(peewee.CharField, max_length=20, null=True)]
    failed_dependency_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    queued_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    started_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    finished_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    parent_task_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    workflow_run_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    source_type: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=20)]
    source_id: Annotated[str | None, ColumnDeclaration(peewee.CharField, max_length=80, null=True)]
    waiting_kind: Annotated[str | None, ColumnDeclaration(peewee.CharField, max_length=20, null=True)]
    waiting_until: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    required_tools: Annotated[str, ColumnDeclaration(JSONField, default=[])]
    extra: Annotated[str, ColumnDeclaration(JSONField, default={})]

    @property
    def deadline(self) -> str | None:
        """The deadline, or None if the task has none.

        The `deadline_key` column stores a maximum value instead of null, so that tasks without a deadline sort last.
        """
        return deadline_of(self.deadline_key)

    def get(self, name: str) -> Any:
        """Return the value of a rarely set field from `extra`, or the field's default."""
        if self.extra == "{}":
            return EXTRA_DEFAULTS[name]
        return msgspec.json.decode(self.extra).get(name, EXTRA_DEFAULTS[name])


class TaskViewColumns(msgspec.Struct):
    """The columns of a task that only views and claims read."""

    updated_at: Annotated[str, ColumnDeclaration(InstantField)]
    assigned_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    description: Annotated[str, ColumnDeclaration(peewee.TextField, default="")]
    instructions: Annotated[str, ColumnDeclaration(peewee.TextField, default="")]
    tags: Annotated[str, ColumnDeclaration(JSONField, default=[])]
    metadata: Annotated[str, ColumnDeclaration(JSONField, default={})]
    progress: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]
    input: Annotated[str, ColumnDeclaration(JSONField, default={})]
    result: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]


EXTRA_DEFAULTS: dict[str, Any] = {
    "allowed_tools": None,
    "approval_id": None,
    "artifacts": [],
    "budget_shortages": {},
    "cancel_reason": None,
    "cancel_requested_at": None,
    "cause_chain": [],
    "checkpoint_floor": 0,
    "dead_letter_id": None,
    "depends_on": [],
    "depth": 0,
    "error": None,
    "lost_in_row": 0,
    "max_cost_usd": None,
    "output_schema": None,
    "queue_timeout_seconds": None,
    "reopened_count": 0,
    "resume": None,
    "resuming": False,
    "retry_policy": None,
    "review_id": None,
    "review_policy": None,
    "stall_policy": None,
    "step_run_id": None,
    "taint_sources": None,
    "tainted": False,
    "used_ms": 0,
    "waiting_for": None,
}
"""The rarely set fields of a task, with their defaults. They are stored in `extra`, and no query filters by them."""


class AttemptRow(msgspec.Struct):
    """The columns of an attempt that the business rules read.

    An attempt is one claim of a task, and is live until it finishes. `n` is the attempt number that the retry policy
    counts; a resumed run keeps its number. `ended_by` names the call that ended the attempt, so that a repeated call
    can be recognised. `cost_limit_micro` is the part of the task's cost limit that remains for the attempt, and
    `cost_warning_micro` is the cost of the attempt at which the task will have used 80 % of its limit. `output_schema`
    is the schema from the agent's configuration if the task has no schema of its own. `reported_usage` contains the
    totals that the worker last reported. The counts of tokens and calls include these totals and the calls through the
    gateway.
    """

    id: Annotated[str, ColumnDeclaration(IdField, primary_key=True)]
    task_id: Annotated[str, ColumnDeclaration(IdField)]
    fence: Annotated[int, ColumnDeclaration(peewee.IntegerField)]
    n: Annotated[int, ColumnDeclaration(peewee.IntegerField)]
    counted: Annotated[bool, ColumnDeclaration(peewee.BooleanField, default=False)]
    resumed: Annotated[bool, ColumnDeclaration(peewee.BooleanField, default=False)]
    status: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=12)]
    worker_id: Annotated[str, ColumnDeclaration(IdField)]
    agent_id: Annotated[str, ColumnDeclaration(IdField)]
    agent_version: Annotated[int, ColumnDeclaration(peewee.IntegerField)]
    requester_id: Annotated[str | None, ColumnDeclaration(IdField, null=True)]
    lease_id: Annotated[str, ColumnDeclaration(IdField, unique=True)]
    lease_until: Annotated[str, ColumnDeclaration(InstantField)]
    ack_until: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    timeout_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    cancel_until: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    last_activity_at: Annotated[str, ColumnDeclaration(InstantField)]
    progress_event_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    output_schema: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]
    stall_seconds: Annotated[int, ColumnDeclaration(peewee.IntegerField, default=0)]
    loop_repeats: Annotated[int, ColumnDeclaration(peewee.IntegerField, default=0)]
    stall_action: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=8, default="notify")]
    stalled: Annotated[bool, ColumnDeclaration(peewee.BooleanField, default=False)]
    signature: Annotated[str | None, ColumnDeclaration(peewee.CharField, max_length=200, null=True)]
    signature_count: Annotated[int, ColumnDeclaration(peewee.IntegerField, default=0)]
    log_bytes: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    log_next: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    cost_micro: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    unpriced_tokens: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    input_tokens: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    output_tokens: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    calls: Annotated[int, ColumnDeclaration(peewee.BigIntegerField, default=0)]
    cost_limit_micro: Annotated[int | None, ColumnDeclaration(peewee.BigIntegerField, null=True)]
    cost_warning_micro: Annotated[int | None, ColumnDeclaration(peewee.BigIntegerField, null=True)]
    reported_usage: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]
    stalls: Annotated[int, ColumnDeclaration(peewee.IntegerField, default=0)]
    ended_by: Annotated[str | None, ColumnDeclaration(peewee.CharField, max_length=40, null=True)]
    started_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    finished_at: Annotated[str | None, ColumnDeclaration(InstantField, null=True)]
    checkpoint_step: Annotated[int | None, ColumnDeclaration(peewee.IntegerField, null=True)]


class AttemptViewColumns(msgspec.Struct):
    """The columns of an attempt that only views, claims and authentication read."""

    model: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=250)]
    token_hash: Annotated[str, ColumnDeclaration(peewee.CharField, max_length=64, unique=True)]
    tainted: Annotated[bool, ColumnDeclaration(peewee.BooleanField, default=False)]
    taint_sources: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]
    created_at: Annotated[str, ColumnDeclaration(InstantField)]
    error: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]
    checkpoint: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]
    result: Annotated[str | None, ColumnDeclaration(JSONField, null=True)]


def deadline_of(key: str) -> str | None:
    """Return the deadline for a `deadline_key`, or None if the key means that there is no deadline."""
    return None if key == NO_DEADLINE else key


def _model_class(name: str, *declarations: type, table: str, indexes: Any, owner_field: str | None = None) -> Any:
    """Create a model class whose columns are the fields of the declarations."""
    hints = {field: hint for each in declarations for field, hint in get_type_hints(each, include_extras=True).items()}
    declared = {field: hint.__metadata__[0] for field, hint in hints.items()}
    columns = {field: column.kind(**column.options) for field, column in declared.items()}
    meta = type("Meta", (), {"table_name": table, "indexes": indexes})
    attributes = {"__module__": __name__, "__doc__": declarations[0].__doc__, "Meta": meta}
    return type(name, (Model,), {**attributes, **columns, "visibility": SHARED, "owner_field": owner_field})


Task = _model_class(
    "Task",
    TaskRow,
    TaskViewColumns,
    table="tasks_tasks",
    owner_field="created_by",
    indexes=(
        (("created_at", "id"), False),
        (("status", "created_at", "id"), False),
        (("updated_at", "id"), False),
        (("priority", "created_at", "id"), False),
        (("source_type", "created_at", "id"), False),
    ),
)
Attempt = _model_class(
    "Attempt",
    AttemptRow,
    AttemptViewColumns,
    table="tasks_attempts",
    indexes=((("task_id", "fence"), True), (("agent_id", "created_at"), False)),
)


class LogLine(Model):
    """A log line of an attempt. The worker numbers the lines with `seq`."""

    id = peewee.BigAutoField()
    task_id = IdField()
    fence = peewee.IntegerField()
    seq = peewee.BigIntegerField()
    ts = InstantField()
    level = peewee.CharField(max_length=8)
    message = peewee.TextField()

    class Meta:
        table_name = "tasks_logs"
        indexes = ((("task_id", "fence", "seq"), True),)


class Comment(Model):
    """A comment on a task. The next claim of the task includes the comment."""

    id = IdField(primary_key=True)
    task_id = IdField()
    author_type = peewee.CharField(max_length=10)
    author_id = peewee.CharField(max_length=80)
    created_by = IdField(null=True)
    body = peewee.TextField()
    created_at = InstantField()

    visibility = SHARED

    class Meta:
        table_name = "tasks_comments"
        indexes = ((("task_id", "created_at", "id"), False),)


class Dependency(Model):
    """A dependency between two tasks: the task `task_id` depends on the task `needs_id`."""

    task_id = IdField()
    needs_id = IdField(index=True)

    class Meta:
        table_name = "tasks_dependencies"
        primary_key = peewee.CompositeKey("task_id", "needs_id")


class WorkerSignal(Model):
    """A change in a lease's state that the server reports to the worker immediately."""

    seq = peewee.BigAutoField()
    worker_id = IdField()
    task_id = IdField()
    lease_id = IdField()
    state = peewee.CharField(max_length=20)
    created_at = InstantField(index=True)

    class Meta:
        table_name = "tasks_signals"
        indexes = ((("worker_id", "seq"), False),)


class TaskCounter(Model):
    """A counter of tasks. The count is the sum of `n` over all shards; the value of a single shard may be negative.

    `name` is `status:<status>:<priority>`, or `open:<user id>` for a person's unfinished tasks.
    """

    name = peewee.CharField(max_length=50)
    shard = peewee.SmallIntegerField()
    n = peewee.BigIntegerField()

    class Meta:
        table_name = "tasks_counters"
        primary_key = peewee.CompositeKey("name", "shard")


class HourlyRollup(Model):
    """Statistics of the attempts and tasks that started or ended in one hour.

    The totals for the hour are the sums over all shards.
    """

    hour = peewee.CharField(max_length=13)
    shard = peewee.SmallIntegerField()
    completed = peewee.BigIntegerField(default=0)
    failed = peewee.BigIntegerField(default=0)
    duration_ms = peewee.BigIntegerField(default=0)
    queued = peewee.BigIntegerField(default=0)
    queue_ms = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "tasks_hourly_rollups"
        primary_key = peewee.CompositeKey("hour", "shard")


class PageAnchor(Model):
    """A saved position in the list of all tasks, for paging by offset.

    The row contains the sort key of a task, and the number of tasks from the previous anchor (exclusive) to this one
    (inclusive).
    """

    created_at = InstantField()
    task_id = IdField()
    n = peewee.IntegerField()

    class Meta:
        table_name = "tasks_page_anchors"
        primary_key = peewee.CompositeKey("created_at", "task_id")


class SearchDocument(Model):
    """A task in the full-text index. `n` is the task's key in the index; newer tasks have larger keys."""

    n = peewee.BigAutoField()
    created_at = InstantField()
    task_id = IdField()

    class Meta:
        table_name = "tasks_documents"
        indexes = ((("created_at", "task_id"), True),)


class TaskTag(Model):
    """A tag of a task. The `tags` column of the task holds the same tags in the order in which the owner gave them."""

    tag = peewee.CharField(max_length=64)
    created_at = InstantField()
    task_id = IdField()

    class Meta:
        table_name = "tasks_tags"
        primary_key = peewee.CompositeKey("tag", "created_at", "task_id")


# The partial indexes start with `status`. Otherwise SQLite prefers the index of the list by status, and has to sort.
def _add_partial_index(model: Any, name: str, *columns: Any, where: str, unique: bool = False) -> None:
    index = model.index(*columns, name=f"{model._meta.table_name}_{name}", where=SQL(where), unique=unique)
    model.add_index(index)


_add_partial_index(
    Task,
    "claim",
    Task.queue,
    Task.rank.desc(),
    Task.deadline_key,
    Task.available_at,
    Task.created_at,
    Task.id,
    where="status = 'pending'",
)
_add_partial_index(
    Task, "tooled", Task.status, Task.queue, where="status = 'pending' AND queue IS NOT NULL AND required_tools <> '[]'"
)
# Used for raising the ranks of waiting tasks and for the age of the oldest pending task.
_add_partial_index(
    Task,
    "waiting_since",
    Task.status,
    Task.rank,
    Task.priority,
    Task.queued_at,
    where="status = 'pending' AND queue IS NOT NULL",
)
_add_partial_index(Task, "parked", Task.status, Task.available_at, where="status = 'pending' AND queue IS NULL")
_add_partial_index(Task, "held", Task.status, Task.created_by, where="status = 'pending' AND queue = 'held'")
_add_partial_index(
    Task, "queue_until", Task.status, Task.queue_until, where="status = 'pending' AND queue_until IS NOT NULL"
)
_add_partial_index(Task, "deadlines", Task.deadline_key, where="deadline_key < '9999' AND finished_at IS NULL")
_add_partial_index(Task, "leased", Task.created_by, where="lease_id IS NOT NULL")
_add_partial_index(Task, "waiting", Task.status, Task.waiting_kind, Task.waiting_until, where="status = 'waiting'")
# The status and the priority are for the statistics, which would otherwise read every task of an agent.
_add_partial_index(
    Task,
    "agent",
    Task.agent_id,
    Task.created_at,
    Task.id,
    Task.status,
    Task.priority,
    where="agent_id IS NOT NULL",
)
_add_partial_index(Task, "requester", Task.created_by, Task.created_at, Task.id, where="created_by IS NOT NULL")
_add_partial_index(Task, "worker", Task.worker_id, Task.created_at, Task.id, where="worker_id IS NOT NULL")
_add_partial_index(Task, "parent", Task.parent_task_id, Task.created_at, where="parent_task_id IS NOT NULL")
_add_partial_index(Task, "run", Task.workflow_run_id, Task.created_at, where="workflow_run_id IS NOT NULL")
_add_partial_index(Task, "ended", Task.finished_at, where="finished_at IS NOT NULL")
_add_partial_index(Attempt, "live", Attempt.task_id, where="finished_at IS NULL", unique=True)
_add_partial_index(Attempt, "live_worker", Attempt.worker_id, where="finished_at IS NULL")
_add_partial_index(Attempt, "live_agent", Attempt.agent_id, where="finished_at IS NULL")

TABLES: tuple[type[Model], ...] = (
    Task,
    Attempt,
    LogLine,
    Comment,
    Dependency,
    WorkerSignal,
    TaskCounter,
    HourlyRollup,
    PageAnchor,
    SearchDocument,
    TaskTag,
)
