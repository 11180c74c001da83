"""Where the untrusted content came from that a run has received."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: Any) -> None:
    for table in ("tasks_tasks", "tasks_attempts"):
        migrator.migrate(migrator.add_column(table, "taint_sources", peewee.TextField(null=True)))
