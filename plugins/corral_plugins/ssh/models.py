"""The database tables for SSH connections and executed commands."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL

from corral.database.model import IdField, InstantField, JSONField, Model


class Connection(Model):
    """A machine on which commands can be run.

    `secret_id` and `passphrase_secret_id` are ids of secrets in the vault. `owns_secret` and `owns_passphrase` say
    whether the secret was submitted with the connection, in which case it is deleted together with the connection.
    `host_key` is the accepted public key, and `seen_key` is the public key that the machine presented most recently.
    Both are OpenSSH public key lines.
    """

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    created_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    name = peewee.CharField(max_length=100)
    name_key = peewee.CharField(max_length=100, unique=True)
    hostname = peewee.CharField(max_length=253)
    port = peewee.IntegerField()
    username = peewee.CharField(max_length=64)
    auth_method: Any = peewee.CharField(max_length=10)
    secret_id = IdField(null=True)
    passphrase_secret_id = IdField(null=True)
    owns_secret = peewee.BooleanField(default=False)
    owns_passphrase = peewee.BooleanField(default=False)
    host_key_policy: Any = peewee.CharField(max_length=10)
    host_key_state: Any = peewee.CharField(max_length=10, default="unknown")
    host_key = peewee.TextField(null=True)
    seen_key = peewee.TextField(null=True)
    allowed_commands: Any = JSONField()
    denied_commands: Any = JSONField()
    require_approval = peewee.BooleanField()
    max_concurrency = peewee.IntegerField()
    description = peewee.TextField(default="")
    tags: Any = JSONField()
    last_tested_at = InstantField(null=True)
    last_error = peewee.TextField(null=True)

    class Meta:
        table_name = "ssh_connections"


class Execution(Model):
    """A command that was run on a machine.

    The Corral process that runs the command regularly extends `alive_until`. A running command counts as abandoned
    after this time.
    """

    id = IdField(primary_key=True)
    connection_id = IdField()
    command = peewee.TextField()
    actor = peewee.CharField(max_length=80)
    task_id = IdField(null=True)
    approval_id = IdField(null=True)
    status: Any = peewee.CharField(max_length=12)
    exit_code = peewee.IntegerField(null=True)
    signal = peewee.CharField(max_length=20, null=True)
    stdout = peewee.TextField(default="")
    stderr = peewee.TextField(default="")
    truncated = peewee.BooleanField(default=False)
    error = peewee.TextField(null=True)
    bytes_out = peewee.BigIntegerField(default=0)
    started_at = InstantField()
    finished_at = InstantField(null=True)
    duration_ms = peewee.BigIntegerField(null=True)
    alive_until = InstantField(null=True)

    class Meta:
        table_name = "ssh_executions"
        indexes = (
            (("connection_id", "started_at", "id"), False),
            (("started_at", "id"), False),
        )


Execution.add_index(
    Execution.index(Execution.alive_until, name="ssh_executions_running", where=SQL("status = 'running'"))
)
TABLES = (Connection, Execution)
