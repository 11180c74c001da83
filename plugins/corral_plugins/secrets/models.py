"""The tables of the vault. Values are sealed; no other column reveals anything about them, not even their length."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import IdField, InstantField, JSONField, Model
from corral.database.sealed import SealedField


class SecretRow(Model):
    """A secret. `version` is the number of the current value; `revision` grows with every change of the row.

    `reminded_days` is the number of days of the last reminder for the current `expires_at`.
    """

    id = IdField(primary_key=True)
    name = peewee.CharField(max_length=128)
    name_key = peewee.CharField(max_length=128)
    category = peewee.CharField(max_length=64)
    description = peewee.TextField()
    expires_at = InstantField(null=True)
    allowed_consumers: Any = JSONField()
    allowed_hosts: Any = JSONField()
    max_versions = peewee.IntegerField()
    version = peewee.IntegerField()
    revision = peewee.IntegerField()
    reminded_days = peewee.IntegerField(null=True)
    created_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    rotated_at = InstantField(null=True)
    last_used_at = InstantField(null=True)
    last_revealed_at = InstantField(null=True)
    deleted_at = InstantField(null=True)

    class Meta:
        table_name = "secrets_secrets"
        indexes = ((("deleted_at", "name_key", "id"), False),)


SecretRow.add_index(
    SecretRow.index(
        SecretRow.name_key, name="secrets_secrets_live_name", unique=True, where=SecretRow.deleted_at.is_null()
    )
)
SecretRow.add_index(
    SecretRow.index(
        SecretRow.expires_at, SecretRow.id, name="secrets_secrets_expiry", where=SecretRow.expires_at.is_null(False)
    )
)


class SecretVersion(Model):
    """A value of a secret, bound to the secret and the version number. `sealed` is null after destruction.

    Until `grace_until` Corral still accepts the value when it verifies signatures.
    """

    id = IdField(primary_key=True)
    secret_id = IdField()
    n = peewee.IntegerField()
    sealed = SealedField(null=True)
    created_by = IdField(null=True)
    created_at = InstantField()
    grace_until = InstantField(null=True)

    class Meta:
        table_name = "secrets_versions"
        indexes = ((("secret_id", "n"), True),)


class SecretReference(Model):
    """An object of a plugin that uses a secret. It refers to the name, so a restored secret works again."""

    id = IdField(primary_key=True)
    name_key = peewee.CharField(max_length=128, index=True)
    plugin = peewee.CharField(max_length=64)
    kind = peewee.CharField(max_length=64)
    object_id = peewee.CharField(max_length=200)
    title = peewee.CharField(max_length=200)
    created_at = InstantField()

    class Meta:
        table_name = "secrets_references"
        indexes = ((("plugin", "kind", "object_id"), True),)


class SecretAlert(Model):
    """The time of the last alert about an object, which limits alerts to one an hour."""

    id = peewee.CharField(primary_key=True, max_length=300)
    raised_at = InstantField(index=True)

    class Meta:
        table_name = "secrets_alerts"


TABLES: tuple[type[Model], ...] = (SecretRow, SecretVersion, SecretReference, SecretAlert)
