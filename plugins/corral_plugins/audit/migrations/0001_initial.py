"""Create the audit tables (hash chain, end of the chain, checkpoints, signing keys) and the append-only triggers."""

from __future__ import annotations

from typing import Any

import peewee
from corral.database.dialect import append_only
from peewee import BigIntegerField, CharField, IntegerField, Model, TextField

GENESIS = "0" * 64


def up(migrator: Any, db: Any) -> None:
    class Base(Model):
        class Meta:
            database = db

    class AuditRow(Base):
        seq = BigIntegerField(primary_key=True)
        id = CharField(max_length=36, unique=True)
        ts = CharField(max_length=24)
        actor_type = CharField(max_length=20)
        actor_id = CharField(max_length=80, null=True)
        on_behalf_of = CharField(max_length=80, null=True)
        session_id = CharField(max_length=80, null=True)
        key_id = CharField(max_length=80, null=True)
        ip = CharField(max_length=45, null=True)
        user_agent = CharField(max_length=300, null=True)
        action = CharField(max_length=120)
        object_type = CharField(max_length=60)
        object_id = CharField(max_length=200, null=True)
        object_name = CharField(max_length=300, null=True)
        outcome = CharField(max_length=10)
        code = CharField(max_length=80, null=True)
        request_id = CharField(max_length=64, null=True)
        changes = TextField()
        details = TextField()
        sha256 = CharField(max_length=64, null=True)
        prev_hash = CharField(max_length=64, unique=True)
        hash = CharField(max_length=64)

        class Meta:
            table_name = "audit_rows"
            indexes = (
                (("ts",), False),
                (("actor_id", "seq"), False),
                (("action", "seq"), False),
                (("object_id", "seq"), False),
                (("object_type", "seq"), False),
            )

    for column, name in (
        (AuditRow.on_behalf_of, "audit_rows_on_behalf_of"),
        (AuditRow.request_id, "audit_rows_request"),
    ):
        AuditRow.add_index(AuditRow.index(column, AuditRow.seq, name=name, where=column.is_null(False)))
    not_success = peewee.SQL("outcome <> 'success'")
    AuditRow.add_index(AuditRow.index(AuditRow.outcome, AuditRow.seq, name="audit_rows_not_success", where=not_success))

    class Head(Base):
        id = IntegerField(primary_key=True)
        seq = BigIntegerField()
        hash = CharField(max_length=64)
        anchor_seq = BigIntegerField()
        anchor_hash = CharField(max_length=64)

        class Meta:
            table_name = "audit_head"

    class Checkpoint(Base):
        seq = BigIntegerField(primary_key=True)
        hash = CharField(max_length=64)
        rows = BigIntegerField()
        ts = CharField(max_length=24)
        signature = CharField(max_length=100)
        key_id = CharField(max_length=16)

        class Meta:
            table_name = "audit_checkpoints"

    class SigningKey(Base):
        id = CharField(primary_key=True, max_length=16)
        public_key = CharField(max_length=60)
        sealed = TextField()
        created_at = CharField(max_length=24)

        class Meta:
            table_name = "audit_keys"

    db.create_tables([AuditRow, Head, Checkpoint, SigningKey])
    Head.insert(id=1, seq=0, hash=GENESIS, anchor_seq=0, anchor_hash=GENESIS).execute()
    anchor = "(SELECT anchor_seq FROM audit_head)"
    append_only(db, "audit_rows", unique=["seq", "id", "prev_hash"], deletable=f"OLD.seq <= {anchor}")
    append_only(db, "audit_checkpoints", unique=["seq"], deletable=f"OLD.seq < {anchor}")
