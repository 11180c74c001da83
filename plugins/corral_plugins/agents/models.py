"""The tables for agents, agent versions and standing tokens."""

from __future__ import annotations

import peewee

from corral.database.model import SHARED, IdField, InstantField, JSONField, Model


class Agent(Model):
    """An agent.

    `last_active_at` is an empty string, not null, until the agent receives its first lease, because lists of agents are
    sorted by this column. Every change to a column other than the state sets a new `stamp`. Stamps are never reused, so
    caches can use them as keys.
    """

    visibility = SHARED
    owner_field = "created_by"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    config_version = peewee.IntegerField(default=1)
    stamp = IdField()
    created_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    name = peewee.CharField(max_length=100)
    name_key = peewee.CharField(max_length=400)
    description = peewee.TextField(default="")
    role = peewee.CharField(max_length=64, default="general", index=True)
    status = peewee.CharField(max_length=10, default="offline")
    status_reason = peewee.CharField(max_length=20, null=True)
    active_tasks = peewee.IntegerField(default=0)
    failures_in_a_row = peewee.IntegerField(default=0)
    stalls_in_a_row = peewee.IntegerField(default=0)
    last_active_at = InstantField(default="")
    llm_provider = peewee.CharField(max_length=64, null=True)
    llm_model = peewee.CharField(max_length=200, null=True)
    system_prompt = peewee.TextField(default="")
    enabled_tools = JSONField(default=list)
    tool_policy = JSONField(default=dict)
    worker_id = IdField(null=True, index=True)
    worker_group = peewee.CharField(max_length=64, null=True)
    worker_labels = JSONField(default=dict)
    config = JSONField()
    max_concurrent_tasks = peewee.IntegerField(default=1)
    monthly_budget_micro = peewee.BigIntegerField(null=True)
    max_cost_per_task_micro = peewee.BigIntegerField(null=True)
    retry_policy = JSONField(null=True)
    stall_policy = JSONField(null=True)
    review_policy = JSONField(null=True)
    tags = JSONField(default=list)
    metadata = JSONField(default=dict)
    deleted_at = InstantField(null=True)

    class Meta:
        table_name = "agents_agents"
        indexes = (
            (("created_at", "id"), False),
            (("last_active_at", "id"), False),
            (("status", "active_tasks", "last_active_at"), False),
        )


LIVING = Agent.deleted_at.is_null()

Agent.add_index(
    peewee.ModelIndex(Agent, (Agent.name_key,), unique=True, where=LIVING, name="agents_agents_living_name")
)
Agent.add_index(
    peewee.ModelIndex(Agent, (Agent.deleted_at,), where=Agent.deleted_at.is_null(False), name="agents_agents_deleted")
)


class AgentVersion(Model):
    """A numbered version of an agent's configuration, as returned by `GET /agents/{id}/versions/{n}`."""

    visibility = SHARED
    owner_field = "created_by"

    id = IdField(primary_key=True)
    agent_id = IdField()
    n = peewee.IntegerField()
    configuration = JSONField()
    changed_fields = JSONField()
    created_by = IdField(null=True)
    created_at = InstantField()

    class Meta:
        table_name = "agents_versions"
        indexes = ((("agent_id", "n"), True),)


class AgentToken(Model):
    """A standing token, with which an agent that runs outside Corral's workers calls the API.

    Only the SHA-256 hash of the token is stored. The token never has more permissions than its creator (`created_by`).
    """

    owner_field = "created_by"

    id = IdField(primary_key=True)
    agent_id = IdField()
    name = peewee.CharField(max_length=100)
    token_hash = peewee.CharField(max_length=64, unique=True)
    scopes = JSONField()
    created_by = IdField(index=True)
    created_at = InstantField()
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "agents_tokens"
        indexes = ((("agent_id", "created_at", "id"), False),)
