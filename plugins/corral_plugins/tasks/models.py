"""The tables of tasks. Only the service writes them; an attempt is live while `finished_at` is null."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model

PRIORITIES = ("low", "medium", "high", "critical")
STATUSES = ("blocked", "pending", "assigned", "running", "waiting", "cancelling", "completed", "failed", "cancelled")
TERMINAL = ("completed", "failed", "cancelled")
LEASED = ("assigned", "running", "cancelling")
NO_DEADLINE = "9999-12-31T23:59:59.999Z"


class Task(Model):
    """One piece of work.

    `queue_key` says who may take it: `agent:<id>`, `role:<role>` or `any`, with `#<toolset>` when it needs tools.
    `queue` is the same while it may be claimed, null until it is available, `held` while its requester is not active.
    `rank` is the priority raised by waiting. `lease_id` is
    the live lease. Money is in micro-USD.
    """

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    status = peewee.CharField(max_length=12)
    priority = peewee.SmallIntegerField()
    rank = peewee.SmallIntegerField()
    rank_at = InstantField(null=True)
    queue = peewee.CharField(max_length=140, null=True)
    queue_key = peewee.CharField(max_length=140)
    deadline_key = InstantField()
    created_at = InstantField()
    updated_at = InstantField()
    created_by = IdField(null=True)
    title = peewee.CharField(max_length=200)
    agent_id = IdField(null=True)
    agent_role = peewee.CharField(max_length=64, null=True)
    assigned_agent_id = IdField(null=True)
    worker_id = IdField(null=True)
    lease_id = IdField(null=True)
    deadline = InstantField(null=True)
    available_at = InstantField()
    timeout_seconds = peewee.IntegerField()
    queue_timeout_seconds = peewee.IntegerField(null=True)
    queue_until = InstantField(null=True)
    max_cost_micro = peewee.BigIntegerField(null=True)
    attempt = peewee.IntegerField(default=0)
    max_attempts = peewee.IntegerField()
    fence = peewee.IntegerField(default=0)
    reopened_count = peewee.IntegerField(default=0)
    lost_in_row = peewee.IntegerField(default=0)
    resuming = peewee.BooleanField(default=False)
    used_ms = peewee.BigIntegerField(default=0)
    checkpoint_floor = peewee.IntegerField(default=0)
    cost_micro = peewee.BigIntegerField(default=0)
    unpriced_tokens = peewee.BigIntegerField(default=0)
    input_tokens = peewee.BigIntegerField(default=0)
    output_tokens = peewee.BigIntegerField(default=0)
    calls = peewee.BigIntegerField(default=0)
    cancel_requested_at = InstantField(null=True)
    cancel_kind = peewee.CharField(max_length=20, null=True)
    cancel_reason = peewee.CharField(max_length=500, null=True)
    failed_dependency_id = IdField(null=True)
    tainted = peewee.BooleanField(default=False)
    taint_sources = JSONField(null=True)
    queued_at = InstantField(null=True)
    assigned_at = InstantField(null=True)
    started_at = InstantField(null=True)
    finished_at = InstantField(null=True)
    parent_task_id = IdField(null=True)
    depth = peewee.SmallIntegerField(default=0)
    workflow_run_id = IdField(null=True)
    step_run_id = IdField(null=True)
    approval_id = IdField(null=True)
    review_id = IdField(null=True)
    dead_letter_id = IdField(null=True)
    source_type = peewee.CharField(max_length=20)
    source_id = peewee.CharField(max_length=80, null=True)
    waiting_kind = peewee.CharField(max_length=20, null=True)
    waiting_until = InstantField(null=True)
    waiting_for = JSONField(null=True)
    resume = JSONField(null=True)
    progress = JSONField(null=True)
    error = JSONField(null=True)
    required_tools = JSONField()
    allowed_tools = JSONField(null=True)
    depends_on = JSONField()
    retry_policy = JSONField(null=True)
    stall_policy = JSONField(null=True)
    review_policy = JSONField(null=True)
    cause_chain = JSONField()
    tags = JSONField()
    metadata = JSONField()
    artifacts = JSONField()
    output_schema = JSONField(null=True)
    description = peewee.TextField(default="")
    instructions = peewee.TextField(default="")
    input = JSONField()
    result = JSONField(null=True)

    visibility = SHARED
    owner_field = "created_by"

    class Meta:
        table_name = "tasks_tasks"
        indexes = (
            (("created_at", "id"), False),
            (("status", "created_at", "id"), False),
            (("updated_at", "id"), False),
            (("priority", "created_at", "id"), False),
        )


class Attempt(Model):
    """One claim of a task. `n` is the attempt it counts as; `ended_by` the call that ended it: a repeat is known.

    `told` is the usage that the worker told last (totals); the figures hold that and the calls of the gateway.
    """

    id = IdField(primary_key=True)
    task_id = IdField()
    fence = peewee.IntegerField()
    n = peewee.IntegerField()
    counted = peewee.BooleanField(default=False)
    resumed = peewee.BooleanField(default=False)
    status = peewee.CharField(max_length=12)
    worker_id = IdField()
    agent_id = IdField()
    agent_version = peewee.IntegerField()
    model = peewee.CharField(max_length=250)
    requester_id = IdField(null=True)
    lease_id = IdField(unique=True)
    token_hash = peewee.CharField(max_length=64, unique=True)
    lease_until = InstantField()
    ack_until = InstantField(null=True)
    timeout_at = InstantField(null=True)
    cancel_until = InstantField(null=True)
    last_activity_at = InstantField()
    progress_event_at = InstantField(null=True)
    stall_seconds = peewee.IntegerField(default=0)
    loop_repeats = peewee.IntegerField(default=0)
    stall_action = peewee.CharField(max_length=8, default="notify")
    stalled = peewee.BooleanField(default=False)
    signature = peewee.CharField(max_length=200, null=True)
    signature_count = peewee.IntegerField(default=0)
    log_bytes = peewee.BigIntegerField(default=0)
    log_next = peewee.BigIntegerField(default=0)
    cost_micro = peewee.BigIntegerField(default=0)
    unpriced_tokens = peewee.BigIntegerField(default=0)
    input_tokens = peewee.BigIntegerField(default=0)
    output_tokens = peewee.BigIntegerField(default=0)
    calls = peewee.BigIntegerField(default=0)
    told = JSONField(null=True)
    stalls = peewee.IntegerField(default=0)
    tainted = peewee.BooleanField(default=False)
    taint_sources = JSONField(null=True)
    ended_by = peewee.CharField(max_length=40, null=True)
    error = JSONField(null=True)
    created_at = InstantField()
    started_at = InstantField(null=True)
    finished_at = InstantField(null=True)
    checkpoint_step = peewee.IntegerField(null=True)
    checkpoint = JSONField(null=True)
    result = JSONField(null=True)

    visibility = SHARED

    class Meta:
        table_name = "tasks_attempts"
        indexes = ((("task_id", "fence"), True), (("agent_id", "created_at"), False))


class LogLine(Model):
    """A line that an attempt wrote; `seq` is the worker's own number."""

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
    """A remark on a task, given to its next claim."""

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
    """`task_id` waits for `needs_id`."""

    task_id = IdField()
    needs_id = IdField(index=True)

    class Meta:
        table_name = "tasks_dependencies"
        primary_key = peewee.CompositeKey("task_id", "needs_id")


class WorkerSignal(Model):
    """Something that a worker should hear at once."""

    seq = peewee.BigAutoField()
    worker_id = IdField()
    task_id = IdField()
    lease_id = IdField()
    state = peewee.CharField(max_length=20)
    created_at = InstantField(index=True)

    class Meta:
        table_name = "tasks_signals"
        indexes = ((("worker_id", "seq"), False),)


class StatusCounter(Model):
    """How many tasks have this status and priority: the sum over all shards. A single shard may be negative."""

    status = peewee.CharField(max_length=12)
    priority = peewee.SmallIntegerField()
    shard = peewee.SmallIntegerField()
    n = peewee.BigIntegerField()

    class Meta:
        table_name = "tasks_counters"
        primary_key = peewee.CompositeKey("status", "priority", "shard")


class OpenTaskCounter(Model):
    """How many unfinished tasks a person has: the sum over all shards."""

    created_by = IdField()
    shard = peewee.SmallIntegerField()
    n = peewee.BigIntegerField()

    class Meta:
        table_name = "tasks_open"
        primary_key = peewee.CompositeKey("created_by", "shard")


class HourlyRollup(Model):
    """What ended in one hour, summed as it happens: the sum over all shards."""

    hour = peewee.CharField(max_length=13)
    shard = peewee.SmallIntegerField()
    completed = peewee.BigIntegerField(default=0)
    failed = peewee.BigIntegerField(default=0)
    duration_ms = peewee.BigIntegerField(default=0)
    queued = peewee.BigIntegerField(default=0)
    queue_ms = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "tasks_hours"
        primary_key = peewee.CompositeKey("hour", "shard")


class PageAnchor(Model):
    """A place in the list of all tasks: its key, and how many tasks are between it and the mark before."""

    created_at = InstantField()
    task_id = IdField()
    n = peewee.IntegerField()

    class Meta:
        table_name = "tasks_marks"
        primary_key = peewee.CompositeKey("created_at", "task_id")


class SearchDocument(Model):
    """A task whose words the search knows. The numbers grow in the order of the list; `tasks_search` has the words."""

    n = peewee.BigAutoField()
    created_at = InstantField()
    task_id = IdField()

    class Meta:
        table_name = "tasks_documents"
        indexes = ((("created_at", "task_id"), True),)


# Those on one status begin with it, or SQLite prefers the index of the list by status and sorts.
def _partial(model: Any, name: str, *columns: Any, where: str, unique: bool = False) -> None:
    index = model.index(*columns, name=f"{model._meta.table_name}_{name}", where=SQL(where), unique=unique)
    model.add_index(index)


_partial(
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
_partial(
    Task,
    "tooled",
    Task.status,
    Task.queue,
    where="status = 'pending' AND queue IS NOT NULL AND required_tools <> '[]'",
)
_partial(Task, "parked", Task.status, Task.available_at, where="status = 'pending' AND queue IS NULL")
_partial(Task, "held", Task.status, Task.created_by, where="status = 'pending' AND queue = 'held'")
_partial(Task, "aging", Task.status, Task.rank_at, where="status = 'pending' AND rank_at IS NOT NULL")
_partial(Task, "oldest", Task.status, Task.queued_at, where="status = 'pending'")
_partial(Task, "queue_until", Task.status, Task.queue_until, where="status = 'pending' AND queue_until IS NOT NULL")
_partial(Task, "deadlines", Task.deadline, where="deadline IS NOT NULL AND finished_at IS NULL")
_partial(Task, "leased", Task.created_by, where="lease_id IS NOT NULL")
_partial(Task, "waiting", Task.status, Task.waiting_kind, Task.waiting_until, where="status = 'waiting'")
_partial(Task, "agent", Task.agent_id, Task.created_at, Task.id, where="agent_id IS NOT NULL")
_partial(Task, "requester", Task.created_by, Task.created_at, Task.id, where="created_by IS NOT NULL")
_partial(Task, "worker", Task.worker_id, Task.created_at, Task.id, where="worker_id IS NOT NULL")
_partial(Task, "parent", Task.parent_task_id, Task.created_at, where="parent_task_id IS NOT NULL")
_partial(Task, "run", Task.workflow_run_id, Task.created_at, where="workflow_run_id IS NOT NULL")
_partial(Task, "ended", Task.finished_at, where="finished_at IS NOT NULL")
_partial(Attempt, "live", Attempt.task_id, where="finished_at IS NULL", unique=True)
_partial(Attempt, "live_worker", Attempt.worker_id, where="finished_at IS NULL")
_partial(Attempt, "live_agent", Attempt.agent_id, where="finished_at IS NULL")

TABLES: tuple[type[Model], ...] = (
    Task,
    Attempt,
    LogLine,
    Comment,
    Dependency,
    WorkerSignal,
    StatusCounter,
    OpenTaskCounter,
    HourlyRollup,
    PageAnchor,
    SearchDocument,
)
