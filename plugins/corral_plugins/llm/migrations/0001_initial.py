"""The table of calls."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Create it."""

    class LlmCall(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        created_at = peewee.CharField(max_length=24)
        kind = peewee.CharField(max_length=12)
        provider = peewee.CharField(max_length=64)
        model = peewee.CharField(max_length=200)
        requested_model = peewee.CharField(max_length=265)
        task_id = peewee.CharField(max_length=36, null=True)
        agent_id = peewee.CharField(max_length=36, null=True)
        conversation_id = peewee.CharField(max_length=36, null=True)
        user_id = peewee.CharField(max_length=36, null=True)
        status = peewee.CharField(max_length=10)
        attempts = peewee.IntegerField()
        input_tokens = peewee.BigIntegerField()
        output_tokens = peewee.BigIntegerField()
        first_token_ms = peewee.BigIntegerField(null=True)
        duration_ms = peewee.BigIntegerField(null=True)
        finish_reason = peewee.CharField(max_length=40, null=True)
        error = peewee.TextField(null=True)

        class Meta:
            database = db
            table_name = "llm_calls"
            legacy_table_names = False
            indexes = (
                (("created_at", "id"), False),
                (("task_id", "created_at"), False),
                (("agent_id", "created_at"), False),
                (("user_id", "created_at"), False),
            )

    db.create_tables([LlmCall])
    db.execute_sql("CREATE INDEX llm_calls_in_flight ON llm_calls (created_at) WHERE (status = 'in_flight')")


def down(migrator: Any, db: peewee.Database) -> None:
    """Drop it."""
    db.execute_sql("DROP TABLE llm_calls")
