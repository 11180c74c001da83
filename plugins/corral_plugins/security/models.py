"""The tables of the `security` plugin."""

from __future__ import annotations

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, JSONField, Model


class ApiKeyRow(Model):
    """An API key, stored as the SHA-256 hash of its token.

    After a rotation, the old token is valid until `old_until`. `reminded` is the number of days before expiry for which
    the owner last received a reminder.
    """

    visibility = PRIVATE
    owner_field = "user_id"

    id = IdField(primary_key=True)
    user_id = IdField()
    name = peewee.CharField(max_length=100)
    prefix = peewee.CharField(max_length=12)
    hash = peewee.CharField(max_length=64, unique=True)
    old_hash = peewee.CharField(max_length=64, null=True)
    old_until = InstantField(null=True)
    scopes = JSONField()
    allowed_cidrs = JSONField()
    created_at = InstantField()
    expires_at = InstantField()
    revoked_at = InstantField(null=True)
    reminded = peewee.IntegerField(null=True)
    last_used_at = InstantField(null=True)
    last_used_ip = peewee.CharField(max_length=45, null=True)

    class Meta:
        table_name = "security_api_keys"
        indexes = ((("user_id", "created_at", "id"), False), (("created_at", "id"), False), (("expires_at",), False))


ApiKeyRow.add_index(
    ApiKeyRow.index(ApiKeyRow.old_hash, name="security_api_keys_old", where=ApiKeyRow.old_hash.is_null(False))
)


class IpRuleRow(Model):
    """An IP rule. `position` is the rule's place in the list of rules."""

    id = IdField(primary_key=True)
    position = peewee.IntegerField()
    cidr = peewee.CharField(max_length=49)
    action = peewee.CharField(max_length=5)
    note = peewee.CharField(max_length=200)
    expires_at = InstantField(null=True)
    created_by = IdField(null=True)
    created_at = InstantField()

    class Meta:
        table_name = "security_ip_rules"
        indexes = ((("expires_at",), False),)


class IpModeRow(Model):
    """The mode of the IP rules. The table has only one row, whose id is the constant `ROW`.

    `version` increases with every change to the rules or the mode.
    """

    id = peewee.IntegerField(primary_key=True)
    mode = peewee.CharField(max_length=9)
    version = peewee.IntegerField()
    updated_at = InstantField()

    class Meta:
        table_name = "security_ip_mode"


ROW = 1
TABLES: tuple[type[Model], ...] = (ApiKeyRow, IpRuleRow, IpModeRow)
