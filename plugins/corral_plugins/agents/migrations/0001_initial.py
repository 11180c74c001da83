"""Creates the tables for agents, agent versions and standing tokens."""

from __future__ import annotations

from typing import Any

from peewee import CharField, IntegerField, Model, ModelIndex, TextField


def up(migrator: Any, db: Any) -> None:
    class Agent(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        config_version = IntegerField()
        stamp = CharField(max_length=36)
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        name = CharField(max_length=100)
        name_key = CharField(max_length=400)
        description = TextField()
        role = CharField(max_length=64, index=True)
        status = CharField(max_length=10)
        status_reason = CharField(max_length=20, null=True)
        active_tasks = IntegerField()
        failures_in_a_row = IntegerField()
        stalls_in_a_row = IntegerField()
        last_active_at = CharField(max_length=24)
        llm_provider = CharField(max_length=64, null=True)
        llm_model = CharField(max_length=200, null=True)
        system_prompt = TextField()
        enabled_tools = TextField()
        tool_policy = TextField()
        worker_id = CharField(max_length=36, null=True, index=True)
        worker_group = CharField(max_length=64, null=True)
        worker_labels = TextField()
        config = TextField()
        max_concurrent_tasks = IntegerField()
        retry_policy = TextField(null=True)
        stall_policy = TextField(null=True)
        tags = TextField()
        metadata = TextField()
        deleted_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "agents_agents"
            indexes = (
                (("created_at", "id"), False),
                (("last_active_at", "id"), False),
                (("status", "active_tasks", "last_active_at"), False),
            )

    Agent.add_index(
        ModelIndex(
            Agent, (Agent.name_key,), unique=True, where=Agent.deleted_at.is_null(), name="agents_agents_living_name"
        )
    )
    Agent.add_index(
        ModelIndex(Agent, (Agent.deleted_at,), where=Agent.deleted_at.is_null(False), name="agents_agents_deleted")
    )

    class Version(Model):
        id = CharField(primary_key=True, max_length=36)
        agent_id = CharField(max_length=36)
        n = IntegerField()
        configuration = TextField()
        changed_fields = TextField()
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "agents_versions"
            indexes = ((("agent_id", "n"), True),)

    class Token(Model):
        id = CharField(primary_key=True, max_length=36)
        agent_id = CharField(max_length=36)
        name = CharField(max_length=100)
        token_hash = CharField(max_length=64, unique=True)
        scopes = TextField()
        created_by = CharField(max_length=36, index=True)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "agents_tokens"
            indexes = ((("agent_id", "created_at", "id"), False),)

    db.create_tables([Agent, Version, Token])
