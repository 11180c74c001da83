"""Creates the vault's tables."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Create the vault's tables and their indexes."""

    class SecretRow(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        name = peewee.CharField(max_length=128)
        name_key = peewee.CharField(max_length=128)
        category = peewee.CharField(max_length=64)
        description = peewee.TextField()
        expires_at = peewee.CharField(max_length=24, null=True)
        allowed_consumers = peewee.TextField()
        allowed_hosts = peewee.TextField()
        max_versions = peewee.IntegerField()
        version = peewee.IntegerField()
        revision = peewee.IntegerField()
        reminded_days = peewee.IntegerField(null=True)
        created_by = peewee.CharField(max_length=36, null=True)
        created_at = peewee.CharField(max_length=24)
        updated_at = peewee.CharField(max_length=24)
        rotated_at = peewee.CharField(max_length=24, null=True)
        last_used_at = peewee.CharField(max_length=24, null=True)
        last_revealed_at = peewee.CharField(max_length=24, null=True)
        deleted_at = peewee.CharField(max_length=24, null=True)

        class Meta:
            database = db
            table_name = "secrets_secrets"
            legacy_table_names = False
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

    class SecretVersion(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        secret_id = peewee.CharField(max_length=36)
        n = peewee.IntegerField()
        sealed = peewee.TextField(null=True)
        created_by = peewee.CharField(max_length=36, null=True)
        created_at = peewee.CharField(max_length=24)
        grace_until = peewee.CharField(max_length=24, null=True)

        class Meta:
            database = db
            table_name = "secrets_versions"
            legacy_table_names = False
            indexes = ((("secret_id", "n"), True),)

    class SecretReference(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        name_key = peewee.CharField(max_length=128, index=True)
        plugin = peewee.CharField(max_length=64)
        kind = peewee.CharField(max_length=64)
        object_id = peewee.CharField(max_length=200)
        title = peewee.CharField(max_length=200)
        created_at = peewee.CharField(max_length=24)

        class Meta:
            database = db
            table_name = "secrets_references"
            legacy_table_names = False
            indexes = ((("plugin", "kind", "object_id"), True),)

    class SecretAlert(peewee.Model):
        id = peewee.CharField(max_length=300, primary_key=True)
        raised_at = peewee.CharField(max_length=24, index=True)

        class Meta:
            database = db
            table_name = "secrets_alerts"
            legacy_table_names = False

    db.create_tables([SecretRow, SecretVersion, SecretReference, SecretAlert])
