"""The tables of the gateway: calls, providers made by the API and what is known of each, places in queues, payloads."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, JSONField, Model

IN_FLIGHT = "in_flight"
WAITING, HELD = "waiting", "held"


class LlmCall(Model):
    """A call to a model. `status`: in_flight | completed | failed | cancelled. `kind`: chat | embedding.

    `input_tokens` exclude those of the cache. `cost_micro_usd` null: unpriced, or not settled.
    """

    visibility = PRIVATE
    owner_field = "user_id"

    id = IdField(primary_key=True)
    created_at = InstantField()
    kind = peewee.CharField(max_length=12)
    provider = peewee.CharField(max_length=64)
    model = peewee.CharField(max_length=200)
    requested_model = peewee.CharField(max_length=265)
    task_id = IdField(null=True)
    lease_id = IdField(null=True)
    agent_id = IdField(null=True)
    conversation_id = IdField(null=True)
    user_id = IdField(null=True)
    status = peewee.CharField(max_length=10, default=IN_FLIGHT)
    attempts = peewee.IntegerField(default=0)
    input_tokens = peewee.BigIntegerField(default=0)
    output_tokens = peewee.BigIntegerField(default=0)
    cache_read_tokens = peewee.BigIntegerField(default=0)
    cache_write_tokens = peewee.BigIntegerField(default=0)
    estimated = peewee.BooleanField(default=False)
    cost_micro_usd = peewee.BigIntegerField(null=True)
    first_token_ms = peewee.BigIntegerField(null=True)
    duration_ms = peewee.BigIntegerField(null=True)
    finish_reason = peewee.CharField(max_length=40, null=True)
    error = JSONField(null=True)

    class Meta:
        table_name = "llm_calls"
        indexes = (
            (("created_at", "id"), False),
            (("task_id", "created_at"), False),
            (("agent_id", "created_at"), False),
            (("user_id", "created_at"), False),
        )


LlmCall.add_index(LlmCall.index(LlmCall.created_at, name="llm_calls_in_flight", where=LlmCall.status == IN_FLIGHT))


class LlmProviderRow(Model):
    """A provider made by the API. `stamp` changes with every write, so that processes notice it."""

    name = peewee.CharField(primary_key=True, max_length=64)
    kind = peewee.CharField(max_length=64)
    base_url = peewee.CharField(max_length=2048, null=True)
    headers: Any = JSONField()
    models: Any = JSONField()
    default_model = peewee.CharField(max_length=200, null=True)
    timeouts: Any = JSONField()
    max_concurrency = peewee.IntegerField(null=True)
    requests_per_minute = peewee.IntegerField(null=True)
    max_retries = peewee.IntegerField()
    enabled = peewee.BooleanField()
    api_key_secret = peewee.CharField(max_length=128, null=True)
    version = peewee.IntegerField(default=1)
    stamp = IdField()
    created_at = InstantField()
    updated_at = InstantField()
    created_by = IdField(null=True)

    class Meta:
        table_name = "llm_providers"


class LlmProviderState(Model):
    """What was seen of a provider, whoever configured it.

    `found_models`: what it told when it was asked last; `stamp` changes with them. `minute` and `calls_in_minute` count
    for `requests_per_minute`. The row is also the lock under which places in the provider's queue are given.
    """

    name = peewee.CharField(primary_key=True, max_length=64)
    found_models: Any = JSONField(null=True)
    stamp = IdField(null=True)
    models_refreshed_at = InstantField(null=True)
    last_ok_at = InstantField(null=True)
    last_error: Any = JSONField(null=True)
    alerted_at = InstantField(null=True)
    minute = peewee.BigIntegerField(default=0)
    calls_in_minute = peewee.IntegerField(default=0)

    class Meta:
        table_name = "llm_provider_states"


class LlmSlot(Model):
    """A call's place with a provider: `waiting` or `held`, good until `until`. Ids sort by arrival.

    `holder` is the process that keeps it alive.
    """

    id = IdField(primary_key=True)
    call_id = IdField(index=True)
    provider = peewee.CharField(max_length=64)
    holder = peewee.CharField(max_length=80)
    state = peewee.CharField(max_length=8)
    until = InstantField()

    class Meta:
        table_name = "llm_slots"
        indexes = ((("provider", "id"), False), (("holder", "provider"), False))


class LlmPayload(Model):
    """What was asked and answered in a call, redacted; kept only where the settings say so."""

    call_id = IdField(primary_key=True)
    created_at = InstantField(index=True)
    request: Any = JSONField()
    response: Any = JSONField(null=True)

    class Meta:
        table_name = "llm_payloads"


TABLES = (LlmCall, LlmProviderRow, LlmProviderState, LlmSlot, LlmPayload)
