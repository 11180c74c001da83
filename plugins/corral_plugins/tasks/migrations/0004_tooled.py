"""Which sets of tools tasks wait with is read from the tasks."""

from __future__ import annotations

from typing import Any


def up(migrator: Any, db: Any) -> None:
    db.execute_sql(
        "CREATE INDEX tasks_tasks_tooled ON tasks_tasks (status, queue)"
        " WHERE status = 'pending' AND queue IS NOT NULL AND required_tools <> '[]'"
    )
    db.execute_sql("DROP TABLE tasks_toolsets")
