"""Create the tables for tasks, their indexes, and the full-text index."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL, Model

from corral.database.full_text import FullTextIndex


def up(migrator: Any, db: Any) -> None:
    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Task(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        version = peewee.IntegerField()
        status = peewee.CharField(max_length=12)
        priority = peewee.SmallIntegerField()
        rank = peewee.SmallIntegerField()
        queue = peewee.CharField(max_length=140, null=True)
        queue_key = peewee.CharField(max_length=140)
        deadline_key = peewee.CharField(max_length=24)
        created_at = peewee.CharField(max_length=24)
        created_by = peewee.CharField(max_length=36, null=True)
        title = peewee.CharField(max_length=200)
        agent_id = peewee.CharField(max_length=36, null=True)
        agent_role = peewee.CharField(max_length=64, null=True)
        assigned_agent_id = peewee.CharField(max_length=36, null=True)
        worker_id = peewee.CharField(max_length=36, null=True)
        lease_id = peewee.CharField(max_length=36, null=True)
        available_at = peewee.CharField(max_length=24)
        timeout_seconds = peewee.IntegerField()
        queue_until = peewee.CharField(max_length=24, null=True)
        attempt = peewee.IntegerField()
        max_attempts = peewee.IntegerField()
        fence = peewee.IntegerField()
        cost_micro = peewee.BigIntegerField()
        unpriced_tokens = peewee.BigIntegerField()
        input_tokens = peewee.BigIntegerField()
        output_tokens = peewee.BigIntegerField()
        calls = peewee.BigIntegerField()
        cancel_kind = peewee.CharField(max_length=20, null=True)
        failed_dependency_id = peewee.CharField(max_length=36, null=True)
        queued_at = peewee.CharField(max_length=24, null=True)
        started_at = peewee.CharField(max_length=24, null=True)
        finished_at = peewee.CharField(max_length=24, null=True)
        parent_task_id = peewee.CharField(max_length=36, null=True)
        workflow_run_id = peewee.CharField(max_length=36, null=True)
        source_type = peewee.CharField(max_length=20)
        source_id = peewee.CharField(max_length=80, null=True)
        waiting_kind = peewee.CharField(max_length=20, null=True)
        waiting_until = peewee.CharField(max_length=24, null=True)
        required_tools = peewee.TextField()
        extra = peewee.TextField()
        updated_at = peewee.CharField(max_length=24)
        assigned_at = peewee.CharField(max_length=24, null=True)
        description = peewee.TextField()
        instructions = peewee.TextField()
        tags = peewee.TextField()
        metadata = peewee.TextField()
        progress = peewee.TextField(null=True)
        input = peewee.TextField()
        result = peewee.TextField(null=True)

        class Meta:
            table_name = "tasks_tasks"
            indexes = (
                (("created_at", "id"), False),
                (("status", "created_at", "id"), False),
                (("updated_at", "id"), False),
                (("priority", "created_at", "id"), False),
            )

    class Attempt(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        task_id = peewee.CharField(max_length=36)
        fence = peewee.IntegerField()
        n = peewee.IntegerField()
        counted = peewee.BooleanField()
        resumed = peewee.BooleanField()
        status = peewee.CharField(max_length=12)
        worker_id = peewee.CharField(max_length=36)
        agent_id = peewee.CharField(max_length=36)
        agent_version = peewee.IntegerField()
        requester_id = peewee.CharField(max_length=36, null=True)
        lease_id = peewee.CharField(max_length=36, unique=True)
        lease_until = peewee.CharField(max_length=24)
        ack_until = peewee.CharField(max_length=24, null=True)
        timeout_at = peewee.CharField(max_length=24, null=True)
        cancel_until = peewee.CharField(max_length=24, null=True)
        last_activity_at = peewee.CharField(max_length=24)
        progress_event_at = peewee.CharField(max_length=24, null=True)
        output_schema = peewee.TextField(null=True)
        stall_seconds = peewee.IntegerField()
        loop_repeats = peewee.IntegerField()
        stall_action = peewee.CharField(max_length=8)
        stalled = peewee.BooleanField()
        signature = peewee.CharField(max_length=200, null=True)
        signature_count = peewee.IntegerField()
        log_bytes = peewee.BigIntegerField()
        log_next = peewee.BigIntegerField()
        cost_micro = peewee.BigIntegerField()
        unpriced_tokens = peewee.BigIntegerField()
        input_tokens = peewee.BigIntegerField()
        output_tokens = peewee.BigIntegerField()
        calls = peewee.BigIntegerField()
        reported_usage = peewee.TextField(null=True)
        stalls = peewee.IntegerField()
        ended_by = peewee.CharField(max_length=40, null=True)
        started_at = peewee.CharField(max_length=24, null=True)
        finished_at = peewee.CharField(max_length=24, null=True)
        checkpoint_step = peewee.IntegerField(null=True)
        model = peewee.CharField(max_length=250)
        token_hash = peewee.CharField(max_length=64, unique=True)
        tainted = peewee.BooleanField()
        taint_sources = peewee.TextField(null=True)
        created_at = peewee.CharField(max_length=24)
        error = peewee.TextField(null=True)
        checkpoint = peewee.TextField(null=True)
        result = peewee.TextField(null=True)

        class Meta:
            table_name = "tasks_attempts"
            indexes = ((("task_id", "fence"), True), (("agent_id", "created_at"), False))

    class LogLine(Base):
        id = peewee.BigAutoField()
        task_id = peewee.CharField(max_length=36)
        fence = peewee.IntegerField()
        seq = peewee.BigIntegerField()
        ts = peewee.CharField(max_length=24)
        level = peewee.CharField(max_length=8)
        message = peewee.TextField()

        class Meta:
            table_name = "tasks_logs"
            indexes = ((("task_id", "fence", "seq"), True),)

    class Comment(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        task_id = peewee.CharField(max_length=36)
        author_type = peewee.CharField(max_length=10)
        author_id = peewee.CharField(max_length=80)
        created_by = peewee.CharField(max_length=36, null=True)
        body = peewee.TextField()
        created_at = peewee.CharField(max_length=24)

        class Meta:
            table_name = "tasks_comments"
            indexes = ((("task_id", "created_at", "id"), False),)

    class Dependency(Base):
        task_id = peewee.CharField(max_length=36)
        needs_id = peewee.CharField(max_length=36, index=True)

        class Meta:
            table_name = "tasks_dependencies"
            primary_key = peewee.CompositeKey("task_id", "needs_id")

    class WorkerSignal(Base):
        seq = peewee.BigAutoField()
        worker_id = peewee.CharField(max_length=36)
        task_id = peewee.CharField(max_length=36)
        lease_id = peewee.CharField(max_length=36)
        state = peewee.CharField(max_length=20)
        created_at = peewee.CharField(max_length=24, index=True)

        class Meta:
            table_name = "tasks_signals"
            indexes = ((("worker_id", "seq"), False),)

    class TaskCounter(Base):
        name = peewee.CharField(max_length=50)
        shard = peewee.SmallIntegerField()
        n = peewee.BigIntegerField()

        class Meta:
            table_name = "tasks_counters"
            primary_key = peewee.CompositeKey("name", "shard")

    class HourlyRollup(Base):
        hour = peewee.CharField(max_length=13)
        shard = peewee.SmallIntegerField()
        completed = peewee.BigIntegerField()
        failed = peewee.BigIntegerField()
        duration_ms = peewee.BigIntegerField()
        queued = peewee.BigIntegerField()
        queue_ms = peewee.BigIntegerField()

        class Meta:
            table_name = "tasks_hourly_rollups"
            primary_key = peewee.CompositeKey("hour", "shard")

    class PageAnchor(Base):
        created_at = peewee.CharField(max_length=24)
        task_id = peewee.CharField(max_length=36)
        n = peewee.IntegerField()

        class Meta:
            table_name = "tasks_page_anchors"
            primary_key = peewee.CompositeKey("created_at", "task_id")

    class SearchDocument(Base):
        n = peewee.BigAutoField()
        created_at = peewee.CharField(max_length=24)
        task_id = peewee.CharField(max_length=36)

        class Meta:
            table_name = "tasks_documents"
            indexes = ((("created_at", "task_id"), True),)

    def partial(model: Any, name: str, *columns: Any, where: str, unique: bool = False) -> None:
        index = model.index(*columns, name=f"{model._meta.table_name}_{name}", where=SQL(where), unique=unique)
        model.add_index(index)

    partial(
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
    partial(
        Task,
        "tooled",
        Task.status,
        Task.queue,
        where="status = 'pending' AND queue IS NOT NULL AND required_tools <> '[]'",
    )
    # Used for raising the ranks of waiting tasks and for the age of the oldest pending task.
    partial(
        Task,
        "waiting_since",
        Task.status,
        Task.rank,
        Task.priority,
        Task.queued_at,
        where="status = 'pending' AND queue IS NOT NULL",
    )
    partial(Task, "parked", Task.status, Task.available_at, where="status = 'pending' AND queue IS NULL")
    partial(Task, "held", Task.status, Task.created_by, where="status = 'pending' AND queue = 'held'")
    partial(Task, "queue_until", Task.status, Task.queue_until, where="status = 'pending' AND queue_until IS NOT NULL")
    partial(Task, "deadlines", Task.deadline_key, where="deadline_key < '9999' AND finished_at IS NULL")
    partial(Task, "leased", Task.created_by, where="lease_id IS NOT NULL")
    partial(Task, "waiting", Task.status, Task.waiting_kind, Task.waiting_until, where="status = 'waiting'")
    partial(Task, "agent", Task.agent_id, Task.created_at, Task.id, where="agent_id IS NOT NULL")
    partial(Task, "requester", Task.created_by, Task.created_at, Task.id, where="created_by IS NOT NULL")
    partial(Task, "worker", Task.worker_id, Task.created_at, Task.id, where="worker_id IS NOT NULL")
    partial(Task, "parent", Task.parent_task_id, Task.created_at, where="parent_task_id IS NOT NULL")
    partial(Task, "run", Task.workflow_run_id, Task.created_at, where="workflow_run_id IS NOT NULL")
    partial(Task, "source", Task.source_type, Task.created_at, Task.id, where="source_type NOT IN ('user', 'api')")
    partial(Task, "ended", Task.finished_at, where="finished_at IS NOT NULL")
    partial(Attempt, "live", Attempt.task_id, where="finished_at IS NULL", unique=True)
    partial(Attempt, "live_worker", Attempt.worker_id, where="finished_at IS NULL")
    partial(Attempt, "live_agent", Attempt.agent_id, where="finished_at IS NULL")

    db.create_tables(
        [
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
        ]
    )
    FullTextIndex("tasks_search", "title", "description").create(db)
