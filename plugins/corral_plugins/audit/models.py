"""The tables of the audit log. Database triggers, which the migration creates, reject changes and deletions of rows."""

from __future__ import annotations

import peewee

from corral.database.model import IdField, InstantField, Model
from corral.database.sealed_columns import SealedField

HEAD = 1
"""The id of the only row in the `audit_head` table."""


class AuditRow(Model):
    """One row of the hash chain. `changes` and `details` are canonical JSON, which is stored and hashed unchanged."""

    seq = peewee.BigIntegerField(primary_key=True)
    id = IdField(unique=True)
    ts = InstantField()
    actor_type = peewee.CharField(max_length=20)
    actor_id = peewee.CharField(max_length=80, null=True)
    on_behalf_of = peewee.CharField(max_length=80, null=True)
    session_id = peewee.CharField(max_length=80, null=True)
    key_id = peewee.CharField(max_length=80, null=True)
    ip = peewee.CharField(max_length=45, null=True)
    user_agent = peewee.CharField(max_length=300, null=True)
    action = peewee.CharField(max_length=120)
    object_type = peewee.CharField(max_length=60)
    object_id = peewee.CharField(max_length=200, null=True)
    object_name = peewee.CharField(max_length=300, null=True)
    outcome = peewee.CharField(max_length=10)
    code = peewee.CharField(max_length=80, null=True)
    request_id = peewee.CharField(max_length=64, null=True)
    changes = peewee.TextField()
    details = peewee.TextField()
    sha256 = peewee.CharField(max_length=64, null=True)
    prev_hash = peewee.CharField(max_length=64, unique=True)
    hash = peewee.CharField(max_length=64)

    class Meta:
        table_name = "audit_rows"
        indexes = (
            (("ts",), False),
            (("actor_id", "seq"), False),
            (("action", "seq"), False),
            (("object_id", "seq"), False),
            (("object_type", "seq"), False),
        )


for _column, _name in (
    (AuditRow.on_behalf_of, "audit_rows_on_behalf_of"),
    (AuditRow.request_id, "audit_rows_request"),
):
    AuditRow.add_index(AuditRow.index(_column, AuditRow.seq, name=_name, where=_column.is_null(False)))
AuditRow.add_index(
    AuditRow.index(
        AuditRow.outcome, AuditRow.seq, name="audit_rows_not_success", where=peewee.SQL("outcome <> 'success'")
    )
)


class ChainHead(Model):
    """The head and the anchor of the hash chain, in a single row that is locked while a row is appended to the log.

    The head is the newest row. The anchor is the newest row that was removed because its retention period had ended;
    the retained rows begin after it.
    """

    id = peewee.IntegerField(primary_key=True)
    seq = peewee.BigIntegerField()
    hash = peewee.CharField(max_length=64)
    anchor_seq = peewee.BigIntegerField()
    anchor_hash = peewee.CharField(max_length=64)

    class Meta:
        table_name = "audit_head"


class CheckpointRow(Model):
    """A signed position in the hash chain. `rows` is the number of rows since the previous checkpoint."""

    seq = peewee.BigIntegerField(primary_key=True)
    hash = peewee.CharField(max_length=64)
    rows = peewee.BigIntegerField()
    ts = InstantField()
    signature = peewee.CharField(max_length=100)
    key_id = peewee.CharField(max_length=16)

    class Meta:
        table_name = "audit_checkpoints"


class AuditSigningKey(Model):
    """The key pair that signs checkpoints. The private key is encrypted under the master key."""

    id = peewee.CharField(primary_key=True, max_length=16)
    public_key = peewee.CharField(max_length=60)
    sealed = SealedField()
    created_at = InstantField()

    class Meta:
        table_name = "audit_keys"


TABLES: tuple[type[Model], ...] = (AuditRow, ChainHead, CheckpointRow, AuditSigningKey)
