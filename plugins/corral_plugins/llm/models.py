"""The table of the gateway: one row a call."""

from __future__ import annotations

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, JSONField, Model

IN_FLIGHT = "in_flight"


class LlmCall(Model):
    """A call to a model. `status`: in_flight | completed | failed | cancelled. `kind`: chat | embedding."""

    visibility = PRIVATE
    owner_field = "user_id"

    id = IdField(primary_key=True)
    created_at = InstantField()
    kind = peewee.CharField(max_length=12)
    provider = peewee.CharField(max_length=64)
    model = peewee.CharField(max_length=200)
    requested_model = peewee.CharField(max_length=265)
    task_id = IdField(null=True)
    agent_id = IdField(null=True)
    conversation_id = IdField(null=True)
    user_id = IdField(null=True)
    status = peewee.CharField(max_length=10, default=IN_FLIGHT)
    attempts = peewee.IntegerField(default=0)
    input_tokens = peewee.BigIntegerField(default=0)
    output_tokens = peewee.BigIntegerField(default=0)
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
