"""The initial tables: workers, registration keys and active alerts."""

from __future__ import annotations

from typing import Any

from peewee import BooleanField, CharField, DoubleField, IntegerField, Model, TextField


def up(migrator: Any, db: Any) -> None:
    class Worker(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        created_by = CharField(max_length=36, null=True)
        registration_key_id = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        name = CharField(max_length=100, unique=True)
        hostname = CharField(max_length=255)
        ip_address = CharField(max_length=45)
        max_agents = IntegerField()
        cpu_cores = IntegerField(null=True)
        memory_total_mb = IntegerField(null=True)
        os_info = TextField(null=True)
        labels = TextField()
        tools = TextField(null=True)
        tool_names = TextField(null=True)
        agent_version = CharField(max_length=100, null=True)
        fingerprint_hash = CharField(max_length=64, null=True)
        group = CharField(max_length=64, null=True, column_name="worker_group")
        is_approved = BooleanField()
        status = CharField(max_length=10)
        cpu_usage_percent = DoubleField(null=True)
        memory_usage_percent = DoubleField(null=True)
        disk_usage_percent = DoubleField(null=True)
        last_heartbeat_at = CharField(max_length=24, null=True)
        last_seen_at = CharField(max_length=24)
        listening_until = CharField(max_length=24)
        resumed_at = CharField(max_length=24)
        configured_at = CharField(max_length=24)
        active_leases = IntegerField()
        embedded = BooleanField()
        last_errors = TextField()
        token_hash = CharField(max_length=64, null=True, unique=True)
        old_token_hash = CharField(max_length=64, null=True, index=True)
        old_token_until = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "workers_workers"
            indexes = ((("created_at", "id"), False), (("status", "last_seen_at"), False))

    class RegistrationKey(Model):
        id = CharField(primary_key=True, max_length=36)
        name = CharField(max_length=100)
        key_hash = CharField(max_length=64, unique=True)
        group = CharField(max_length=64, null=True, column_name="worker_group")
        auto_approve = BooleanField()
        max_uses = IntegerField(null=True)
        uses = IntegerField()
        embedded = BooleanField()
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24, index=True)
        last_used_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "workers_registration_keys"
            indexes = ((("created_at", "id"), False),)

    class Alert(Model):
        kind = CharField(primary_key=True, max_length=40)
        since = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "workers_alerts"

    db.create_tables([Worker, RegistrationKey, Alert])
