"""Create the tables for API keys and IP rules."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import SQL, Model


def up(migrator: Any, db: Any) -> None:
    class ApiKeyRow(Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        user_id = peewee.CharField(max_length=36)
        name = peewee.CharField(max_length=100)
        prefix = peewee.CharField(max_length=12)
        hash = peewee.CharField(max_length=64, unique=True)
        old_hash = peewee.CharField(max_length=64, null=True)
        old_until = peewee.CharField(max_length=24, null=True)
        scopes = peewee.TextField()
        allowed_cidrs = peewee.TextField()
        created_at = peewee.CharField(max_length=24)
        expires_at = peewee.CharField(max_length=24)
        revoked_at = peewee.CharField(max_length=24, null=True)
        reminded = peewee.IntegerField(null=True)
        last_used_at = peewee.CharField(max_length=24, null=True)
        last_used_ip = peewee.CharField(max_length=45, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "security_api_keys"
            indexes = (
                (("user_id", "created_at", "id"), False),
                (("created_at", "id"), False),
                (("expires_at",), False),
            )

    class IpRuleRow(Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        position = peewee.IntegerField()
        cidr = peewee.CharField(max_length=49)
        action = peewee.CharField(max_length=5)
        note = peewee.CharField(max_length=200)
        expires_at = peewee.CharField(max_length=24, null=True)
        created_by = peewee.CharField(max_length=36, null=True)
        created_at = peewee.CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "security_ip_rules"
            indexes = ((("expires_at",), False),)

    class IpModeRow(Model):
        id = peewee.IntegerField(primary_key=True)
        mode = peewee.CharField(max_length=9)
        version = peewee.IntegerField()
        updated_at = peewee.CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "security_ip_mode"

    old = SQL("old_hash IS NOT NULL")
    ApiKeyRow.add_index(ApiKeyRow.index(ApiKeyRow.old_hash, name="security_api_keys_old", where=old))
    db.create_tables([ApiKeyRow, IpRuleRow, IpModeRow])
    IpModeRow.create(id=1, mode="off", version=1, updated_at="0001-01-01T00:00:00.000Z")
