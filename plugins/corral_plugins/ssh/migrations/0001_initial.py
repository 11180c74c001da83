"""Creates the tables for SSH connections and executed commands."""

from __future__ import annotations

from typing import Any

from peewee import SQL, BigIntegerField, BooleanField, CharField, Database, IntegerField, Model, ModelIndex, TextField


def up(migrator: Any, db: Database) -> None:
    """Create the tables for SSH connections and executed commands, and their indexes."""

    class Connection(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        name = CharField(max_length=100)
        name_key = CharField(max_length=100, unique=True)
        hostname = CharField(max_length=253)
        port = IntegerField()
        username = CharField(max_length=64)
        auth_method = CharField(max_length=10)
        secret_id = CharField(max_length=36, null=True)
        passphrase_secret_id = CharField(max_length=36, null=True)
        owns_secret = BooleanField()
        owns_passphrase = BooleanField()
        host_key_policy = CharField(max_length=10)
        host_key_state = CharField(max_length=10)
        host_key = TextField(null=True)
        seen_key = TextField(null=True)
        allowed_commands = TextField()
        denied_commands = TextField()
        require_approval = BooleanField()
        max_concurrency = IntegerField()
        description = TextField()
        tags = TextField()
        last_tested_at = CharField(max_length=24, null=True)
        last_error = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "ssh_connections"

    class Execution(Model):
        id = CharField(primary_key=True, max_length=36)
        connection_id = CharField(max_length=36)
        command = TextField()
        actor = CharField(max_length=80)
        task_id = CharField(max_length=36, null=True)
        approval_id = CharField(max_length=36, null=True)
        status = CharField(max_length=12)
        exit_code = IntegerField(null=True)
        signal = CharField(max_length=20, null=True)
        stdout = TextField()
        stderr = TextField()
        truncated = BooleanField()
        error = TextField(null=True)
        bytes_out = BigIntegerField()
        started_at = CharField(max_length=24)
        finished_at = CharField(max_length=24, null=True)
        duration_ms = BigIntegerField(null=True)
        alive_until = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "ssh_executions"
            indexes = (
                (("connection_id", "started_at", "id"), False),
                (("started_at", "id"), False),
            )

    db.create_tables([Connection, Execution])
    running = SQL("status = 'running'")
    db.execute(ModelIndex(Execution, (Execution.alive_until,), where=running, name="ssh_executions_running"))
