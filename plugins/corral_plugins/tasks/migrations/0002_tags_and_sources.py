"""Add a table for the tags of tasks, and include tasks from people in the index on the source of tasks."""

from __future__ import annotations

import itertools
import json
from typing import Any

import peewee
from peewee import Model

from corral.database.dialect import stores_rows_in_primary_key

ROWS = 200


def up(migrator: Any, db: Any) -> None:
    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Task(Base):
        id = peewee.CharField(max_length=36, primary_key=True)
        created_at = peewee.CharField(max_length=24)
        tags = peewee.TextField()

        class Meta:
            table_name = "tasks_tasks"

    class TaskTag(Base):
        tag = peewee.CharField(max_length=64)
        created_at = peewee.CharField(max_length=24)
        task_id = peewee.CharField(max_length=36)

        class Meta:
            table_name = "tasks_tags"
            primary_key = peewee.CompositeKey("tag", "created_at", "task_id")
            without_rowid = stores_rows_in_primary_key(db)

    db.create_tables([TaskTag])
    tagged = Task.select(Task.id, Task.created_at, Task.tags).where(Task.tags != "[]").tuples().iterator()
    rows = ((tag, created_at, task_id) for task_id, created_at, tags in tagged for tag in sorted({*json.loads(tags)}))
    while some := list(itertools.islice(rows, ROWS)):
        TaskTag.insert_many(some, fields=[TaskTag.tag, TaskTag.created_at, TaskTag.task_id]).execute()
    db.execute_sql('DROP INDEX "tasks_tasks_source"')
    columns = '"source_type", "created_at", "id"'
    db.execute_sql(f'CREATE INDEX "tasks_tasks_source_type_created_at_id" ON "tasks_tasks" ({columns})')
