"""Create the tables for dead letters, retry batches, and the time of the last check for missing dead letters."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL, CharField, IntegerField, SmallIntegerField, TextField


def up(migrator: Any, db: Any) -> None:
    class DeadLetter(peewee.Model):
        id = CharField(max_length=36, primary_key=True)
        created_at = CharField(max_length=24)
        task_id = CharField(max_length=36)
        title = CharField(max_length=200)
        agent_id = CharField(max_length=36, null=True)
        workflow_run_id = CharField(max_length=36, null=True)
        reason = CharField(max_length=20)
        error_kind = CharField(max_length=30)
        error_type = CharField(max_length=100)
        error_message = TextField()
        after_fence = IntegerField()
        fence = IntegerField()
        snapshot = TextField()
        first_failed_at = CharField(max_length=24)
        retry_count = IntegerField()
        note = TextField(null=True)
        status = CharField(max_length=10)
        resolved_by = CharField(max_length=36, null=True)
        resolved_at = CharField(max_length=24, null=True)
        batch_id = CharField(max_length=36, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "dead_letter_letters"
            indexes = (
                (("created_at", "id"), False),
                (("status", "created_at", "id"), False),
                (("task_id", "created_at"), False),
            )

    for name, columns, where, unique in (
        ("open", (DeadLetter.task_id,), "status = 'open'", True),
        ("batch", (DeadLetter.batch_id, DeadLetter.resolved_at), "batch_id IS NOT NULL", False),
        ("retried", (DeadLetter.resolved_at,), "status = 'retried'", False),
    ):
        index = DeadLetter.index(*columns, name=f"dead_letter_letters_{name}", where=SQL(where), unique=unique)
        DeadLetter.add_index(index)

    class Batch(peewee.Model):
        id = CharField(max_length=36, primary_key=True)
        status = CharField(max_length=10)
        reason = CharField(max_length=20, null=True)
        filter = TextField()
        rate = IntegerField()
        created_by = CharField(max_length=36, null=True)
        started_at = CharField(max_length=24, index=True)
        finished_at = CharField(max_length=24, null=True)
        matched = IntegerField()
        handled = IntegerField()
        requeued = IntegerField()
        skipped = TextField()
        seen_at = CharField(max_length=24)
        seen_id = CharField(max_length=36)
        next_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "dead_letter_batches"

    Batch.add_index(
        Batch.index(Batch.status, name="dead_letter_batches_running", where=SQL("status = 'running'"), unique=True)
    )

    class Completeness(peewee.Model):
        id = SmallIntegerField(primary_key=True)
        until = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "dead_letter_completeness"

    db.create_tables([DeadLetter, Batch, Completeness])
