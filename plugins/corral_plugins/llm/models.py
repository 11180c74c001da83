"""The database tables of the LLM gateway: calls, payloads, providers, provider states and concurrency slots."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, JSONField, Model

IN_FLIGHT = "in_flight"
WAITING, HELD = "waiting", "held"


class LlmCall(Model):
    """A call to a model. `status` is in_flight, completed, failed or cancelled. `kind` is chat or embedding.

    `input_tokens` excludes cache tokens. `cost_micro_usd` is null if the model has no price or no cost has been
    recorded yet.
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
    """A provider that was created through the API.

    `revision` changes with every write, so that other processes detect the change.
    """

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
    passthrough = peewee.BooleanField()
    enabled = peewee.BooleanField()
    api_key_secret = peewee.CharField(max_length=128, null=True)
    version = peewee.IntegerField(default=1)
    revision = IdField()

    class Meta:
        table_name = "llm_providers"


class LlmProviderState(Model):
    """The observed state of a provider.

    The provider can come from any source: `corral.toml`, the API, a preset or an implicit kind. `listed_models` are the
    models that the provider listed most recently; `revision` changes whenever this list changes. `calls_in_minute` is
    the number of calls in `minute`, for the limit `requests_per_minute`. Slots are assigned under a lock on this row.
    """

    name = peewee.CharField(primary_key=True, max_length=64)
    listed_models: Any = JSONField(null=True)
    revision = IdField(null=True)
    models_refreshed_at = InstantField(null=True)
    last_ok_at = InstantField(null=True)
    last_error: Any = JSONField(null=True)
    alerted_at = InstantField(null=True)
    minute = peewee.BigIntegerField(default=0)
    calls_in_minute = peewee.IntegerField(default=0)

    class Meta:
        table_name = "llm_provider_states"


class LlmSlot(Model):
    """A concurrency slot of a provider, for one call. `state` is `waiting` or `held`; the slot expires at `until`.

    Sorting by `id` gives the order in which the calls arrived. `holder` is the process that renews the slot.
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
    """The redacted request and response of a call, stored if the `llm.store_payloads` setting requires it."""

    call_id = IdField(primary_key=True)
    created_at = InstantField(index=True)
    request: Any = JSONField()
    response: Any = JSONField(null=True)

    class Meta:
        table_name = "llm_payloads"


TABLES = (LlmCall, LlmProviderRow, LlmProviderState, LlmSlot, LlmPayload)
