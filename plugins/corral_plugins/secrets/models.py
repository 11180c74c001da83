"""The database tables of the vault.

Values are encrypted. No other column reveals anything about a value, not even its length.
"""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.model import IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField


class SecretRow(Model):
    """A secret. `version` is the number of the current value. `revision` increases with every change to the row.

    `reminded_days` is the number of days before expiry for which the last reminder was sent. A new value or a new
    `expires_at` resets it.
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
    """One version of a secret's value, encrypted specifically for this secret and version number.

    `sealed` is the encrypted value, or null after the value was destroyed. After the value has been replaced, Corral
    still accepts signatures made with it until `grace_until`.
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
    """A reference to a secret from an object of another plugin.

    The row contains the name of the secret instead of its id, so the reference becomes valid again if the secret is
    deleted and then restored.
    """

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


class LastSecretAlert(Model):
    """The time of the last alert of one kind about an object.

    Alerts of the same kind about the same object are limited to one per hour.
    """

    id = peewee.CharField(primary_key=True, max_length=300)
    raised_at = InstantField(index=True)

    class Meta:
        table_name = "secrets_alerts"


TABLES: tuple[type[Model], ...] = (SecretRow, SecretVersion, SecretReference, LastSecretAlert)
