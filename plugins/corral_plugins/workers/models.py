"""The tables of the `workers` plugin. Only this plugin's service layer writes to these tables."""

from __future__ import annotations

import peewee

from corral.database.model import ADMIN, SHARED, IdField, InstantField, JSONField, Model

NEVER = "0000-01-01T00:00:00.000Z"
"""A timestamp that sorts before all others. It is used instead of null in columns that are compared."""


class Worker(Model):
    """A worker. Its tokens and its fingerprint are stored as SHA-256 hashes.

    `tools` is null if the worker did not report its tools, and empty if it offers none. `tool_names` contains only the
    names of the tools. Changes to the usage, the lease count or the time of the last contact do not change `version`.
    """

    visibility = SHARED
    owner_field = "created_by"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    created_by = IdField(null=True)
    registration_key_id = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    name = peewee.CharField(max_length=100, unique=True)
    hostname = peewee.CharField(max_length=255, default="")
    ip_address = peewee.CharField(max_length=45, default="")
    max_agents = peewee.IntegerField(default=1)
    cpu_cores = peewee.IntegerField(null=True)
    memory_total_mb = peewee.IntegerField(null=True)
    os_info = JSONField(null=True)
    labels = JSONField(default=dict)
    tools = JSONField(null=True)
    tool_names = JSONField(null=True)
    agent_version = peewee.CharField(max_length=100, null=True)
    fingerprint_hash = peewee.CharField(max_length=64, null=True)
    group = peewee.CharField(max_length=64, null=True, column_name="worker_group")
    is_approved = peewee.BooleanField(default=False)
    status = peewee.CharField(max_length=10, default="pending")
    cpu_usage_percent = peewee.DoubleField(null=True)
    memory_usage_percent = peewee.DoubleField(null=True)
    disk_usage_percent = peewee.DoubleField(null=True)
    last_heartbeat_at = InstantField(null=True)
    last_seen_at = InstantField(default=NEVER)
    listening_until = InstantField(default=NEVER)
    resumed_at = InstantField(default=NEVER)
    configured_at = InstantField(default=NEVER)
    active_leases = peewee.IntegerField(default=0)
    embedded = peewee.BooleanField(default=False)
    last_errors = JSONField(default=list)
    token_hash = peewee.CharField(max_length=64, null=True, unique=True)
    old_token_hash = peewee.CharField(max_length=64, null=True, index=True)
    old_token_until = InstantField(default=NEVER)

    class Meta:
        table_name = "workers_workers"
        indexes = ((("created_at", "id"), False), (("status", "last_seen_at"), False))


class RegistrationKey(Model):
    """A key that workers use to register. Only the SHA-256 hash of the key is stored.

    If `embedded` is true, the key is for the embedded worker only and is never listed.
    """

    visibility = ADMIN

    id = IdField(primary_key=True)
    name = peewee.CharField(max_length=100)
    key_hash = peewee.CharField(max_length=64, unique=True)
    group = peewee.CharField(max_length=64, null=True, column_name="worker_group")
    auto_approve = peewee.BooleanField(default=False)
    max_uses = peewee.IntegerField(null=True)
    uses = peewee.IntegerField(default=0)
    embedded = peewee.BooleanField(default=False)
    created_by = IdField(null=True)
    created_at = InstantField()
    expires_at = InstantField(index=True)
    last_used_at = InstantField(null=True)

    class Meta:
        table_name = "workers_registration_keys"
        indexes = ((("created_at", "id"), False),)


class ActiveWorkerAlert(Model):
    """An active alert. The same alert is not raised again until it has been cleared."""

    kind = peewee.CharField(primary_key=True, max_length=40)
    since = InstantField()

    class Meta:
        table_name = "workers_alerts"


MODELS: tuple[type[Model], ...] = (Worker, RegistrationKey, ActiveWorkerAlert)
