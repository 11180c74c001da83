"""The tables for dead letters, for retry batches, and for the time of the last check for missing dead letters."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL

from corral.database.model import IdField, InstantField, JSONField, Model


class DeadLetter(Model):
    """A dead letter, which refers to a failed task.

    The letter shows those attempts of its task whose fences (claim numbers) are greater than `after_fence` and at
    most `fence`. `batch_id` is the batch that retried the task. `snapshot` is JSON text.
    """

    id = IdField(primary_key=True)
    created_at = InstantField()
    task_id = IdField()
    title = peewee.CharField(max_length=200)
    agent_id = IdField(null=True)
    workflow_run_id = IdField(null=True)
    reason = peewee.CharField(max_length=20)
    error_kind = peewee.CharField(max_length=30)
    error_type = peewee.CharField(max_length=100)
    error_message = peewee.TextField()
    after_fence = peewee.IntegerField()
    fence = peewee.IntegerField()
    snapshot = peewee.TextField()
    first_failed_at = InstantField()
    retry_count = peewee.IntegerField()
    note = peewee.TextField(null=True)
    status = peewee.CharField(max_length=10, default="open")
    resolved_by = IdField(null=True)
    resolved_at = InstantField(null=True)
    batch_id = IdField(null=True)

    class Meta:
        table_name = "dead_letter_letters"
        indexes = (
            (("created_at", "id"), False),
            (("status", "created_at", "id"), False),
            (("task_id", "created_at"), False),
        )


def _add_partial_index(name: str, *columns: Any, where: str, unique: bool = False) -> None:
    DeadLetter.add_index(
        DeadLetter.index(*columns, name=f"dead_letter_letters_{name}", where=SQL(where), unique=unique)
    )


_add_partial_index("open", DeadLetter.task_id, where="status = 'open'", unique=True)
_add_partial_index("batch", DeadLetter.batch_id, DeadLetter.resolved_at, where="batch_id IS NOT NULL")
_add_partial_index("retried", DeadLetter.resolved_at, where="status = 'retried'")


class Batch(Model):
    """A batch that retries dead letters, oldest first, at a limited rate.

    The letters are those that were open when the batch started and that match `filter`. `seen_at` and `seen_id`
    identify the last letter that the batch processed. `next_at` is the time of the next retry. `skipped` lists at most
    1,000 letters.
    """

    id = IdField(primary_key=True)
    status = peewee.CharField(max_length=10, default="running")
    reason = peewee.CharField(max_length=20, null=True)
    filter: Any = JSONField()
    rate = peewee.IntegerField()
    created_by = IdField(null=True)
    started_at = InstantField(index=True)
    finished_at = InstantField(null=True)
    matched = peewee.IntegerField()
    handled = peewee.IntegerField(default=0)
    requeued = peewee.IntegerField(default=0)
    skipped: Any = JSONField(default=list)
    seen_at = InstantField(default="")
    seen_id = IdField(default="")
    next_at = InstantField()

    class Meta:
        table_name = "dead_letter_batches"


Batch.add_index(
    Batch.index(Batch.status, name="dead_letter_batches_running", where=SQL("status = 'running'"), unique=True)
)


class BackfillWatermark(Model):
    """The time until which every failed task has a dead letter. The table has a single row."""

    id = peewee.SmallIntegerField(primary_key=True)
    until = InstantField()

    class Meta:
        table_name = "dead_letter_completeness"


TABLES: tuple[type[Model], ...] = (DeadLetter, Batch, BackfillWatermark)
