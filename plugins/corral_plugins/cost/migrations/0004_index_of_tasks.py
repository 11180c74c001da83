"""Extend the index on task rollups to cover all columns that the report by task reads."""

from __future__ import annotations

from typing import Any


def up(migrator: Any, db: Any) -> None:
    """Replace the index on task rollups with one that also contains the days and costs of tasks."""
    db.execute_sql("DROP INDEX cost_rollups_task")
    columns, is_task = '"key", "period", "cost_micro", "series"', "series || '' = 'task'"
    db.execute_sql(f'CREATE INDEX "cost_rollups_task" ON "cost_rollups" ({columns}) WHERE {is_task}')
