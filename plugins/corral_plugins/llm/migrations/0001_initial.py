"""Create the tables of the `llm` plugin."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Create the tables and indexes."""

    class LlmCall(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        created_at = peewee.CharField(max_length=24)
        kind = peewee.CharField(max_length=12)
        provider = peewee.CharField(max_length=64)
        model = peewee.CharField(max_length=200)
        requested_model = peewee.CharField(max_length=265)
        task_id = peewee.CharField(max_length=36, null=True)
        lease_id = peewee.CharField(max_length=36, null=True)
        agent_id = peewee.CharField(max_length=36, null=True)
        conversation_id = peewee.CharField(max_length=36, null=True)
        user_id = peewee.CharField(max_length=36, null=True)
        status = peewee.CharField(max_length=10)
        attempts = peewee.IntegerField()
        input_tokens = peewee.BigIntegerField()
        output_tokens = peewee.BigIntegerField()
        cache_read_tokens = peewee.BigIntegerField()
        cache_write_tokens = peewee.BigIntegerField()
        estimated = peewee.BooleanField()
        cost_micro_usd = peewee.BigIntegerField(null=True)
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

    class LlmProviderRow(peewee.Model):
        name = peewee.CharField(max_length=64, primary_key=True)
        kind = peewee.CharField(max_length=64)
        base_url = peewee.CharField(max_length=2048, null=True)
        headers = peewee.TextField()
        models = peewee.TextField()
        default_model = peewee.CharField(max_length=200, null=True)
        timeouts = peewee.TextField()
        max_concurrency = peewee.IntegerField(null=True)
        requests_per_minute = peewee.IntegerField(null=True)
        max_retries = peewee.IntegerField()
        passthrough = peewee.BooleanField()
        enabled = peewee.BooleanField()
        api_key_secret = peewee.CharField(max_length=128, null=True)
        version = peewee.IntegerField()
        revision = peewee.CharField(max_length=36)

        class Meta:
            database = db
            table_name = "llm_providers"
            legacy_table_names = False

    class LlmProviderState(peewee.Model):
        name = peewee.CharField(max_length=64, primary_key=True)
        listed_models = peewee.TextField(null=True)
        revision = peewee.CharField(max_length=36, null=True)
        models_refreshed_at = peewee.CharField(max_length=24, null=True)
        last_ok_at = peewee.CharField(max_length=24, null=True)
        last_error = peewee.TextField(null=True)
        alerted_at = peewee.CharField(max_length=24, null=True)
        minute = peewee.BigIntegerField()
        calls_in_minute = peewee.IntegerField()

        class Meta:
            database = db
            table_name = "llm_provider_states"
            legacy_table_names = False

    class LlmSlot(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        call_id = peewee.CharField(max_length=36, index=True)
        provider = peewee.CharField(max_length=64)
        holder = peewee.CharField(max_length=80)
        state = peewee.CharField(max_length=8)
        until = peewee.CharField(max_length=24)

        class Meta:
            database = db
            table_name = "llm_slots"
            legacy_table_names = False
            indexes = ((("provider", "id"), False), (("holder", "provider"), False))

    class LlmPayload(peewee.Model):
        call_id = peewee.CharField(max_length=36, primary_key=True)
        created_at = peewee.CharField(max_length=24, index=True)
        request = peewee.TextField()
        response = peewee.TextField(null=True)

        class Meta:
            database = db
            table_name = "llm_payloads"
            legacy_table_names = False

    db.create_tables([LlmCall, LlmProviderRow, LlmProviderState, LlmSlot, LlmPayload])
    db.execute_sql("CREATE INDEX llm_calls_in_flight ON llm_calls (created_at) WHERE (status = 'in_flight')")
