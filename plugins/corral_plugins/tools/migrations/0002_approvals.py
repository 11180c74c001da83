"""Adds the columns for tool calls that wait for an approval."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: Any) -> None:
    columns = {
        "approval_id": peewee.CharField(max_length=36, null=True),
        "approved_at": peewee.CharField(max_length=24, null=True),
        "held_arguments": peewee.TextField(null=True),
    }
    migrator.migrate(*(migrator.add_column("tools_calls", name, field) for name, field in columns.items()))
    db.execute_sql(
        'CREATE INDEX "tools_calls_held" ON "tools_calls" ("approval_id") WHERE status = \'pending_approval\''
    )
