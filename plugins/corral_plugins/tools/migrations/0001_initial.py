"""Creates the initial tables, which store tool overrides and tool calls."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL, Model


def up(migrator: Any, db: Any) -> None:
    class ToolRow(Model):
        name = peewee.CharField(max_length=200, primary_key=True)
        version = peewee.IntegerField()
        enabled = peewee.BooleanField()
        default_policy = peewee.CharField(max_length=5, null=True)
        risk = peewee.CharField(max_length=10, null=True)
        timeout_seconds = peewee.IntegerField(null=True)
        config = peewee.TextField(null=True)
        updated_at = peewee.CharField(max_length=24)
        updated_by = peewee.CharField(max_length=36, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "tools_tools"

    class ToolCall(Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        call_id = peewee.CharField(max_length=64)
        task_id = peewee.CharField(max_length=36)
        fence = peewee.IntegerField()
        lease_id = peewee.CharField(max_length=36)
        agent_id = peewee.CharField(max_length=36)
        worker_id = peewee.CharField(max_length=36, null=True)
        requester_id = peewee.CharField(max_length=36, null=True)
        tool = peewee.CharField(max_length=200)
        arguments = peewee.TextField()
        arguments_sha256 = peewee.CharField(max_length=64)
        decision = peewee.CharField(max_length=8)
        reason = peewee.CharField(max_length=40, null=True)
        status = peewee.CharField(max_length=16)
        result = peewee.TextField(null=True)
        error = peewee.TextField(null=True)
        tainted = peewee.BooleanField()
        executions = peewee.IntegerField()
        permit_until = peewee.CharField(max_length=24, null=True)
        alive_until = peewee.CharField(max_length=24, null=True)
        created_at = peewee.CharField(max_length=24)
        finished_at = peewee.CharField(max_length=24, null=True)
        duration_ms = peewee.BigIntegerField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "tools_calls"
            indexes = (
                (("task_id", "call_id"), True),
                (("task_id", "created_at", "id"), False),
                (("created_at", "id"), False),
                (("agent_id", "created_at", "id"), False),
                (("tool", "created_at", "id"), False),
            )

    is_open = SQL("status IN ('running', 'permitted')")
    ToolCall.add_index(ToolCall.index(ToolCall.alive_until, name="tools_calls_alive", where=is_open))
    ToolCall.add_index(ToolCall.index(ToolCall.task_id, name="tools_calls_open", where=is_open))
    db.create_tables([ToolRow, ToolCall])
