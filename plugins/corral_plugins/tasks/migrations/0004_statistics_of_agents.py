"""Extend the index that finds tasks by agent, so that it also supports counts by status and priority."""

from __future__ import annotations

from typing import Any

COLUMNS = '"agent_id", "created_at", "id", "status", "priority"'


def up(migrator: Any, db: Any) -> None:
    """Replace the index."""
    db.execute_sql('DROP INDEX "tasks_tasks_agent"')
    db.execute_sql(f'CREATE INDEX "tasks_tasks_agent" ON "tasks_tasks" ({COLUMNS}) WHERE agent_id IS NOT NULL')
