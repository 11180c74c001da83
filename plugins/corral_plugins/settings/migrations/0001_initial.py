"""Create the tables for stored settings, their history and their version."""

from __future__ import annotations

from typing import Any

from peewee import BigIntegerField, BooleanField, CharField, IntegerField, Model, TextField


def up(migrator: Any, db: Any) -> None:
    class ValueRow(Model):
        name = CharField(primary_key=True, max_length=80)
        is_set = BooleanField()
        value = TextField(null=True)
        sealed = TextField(null=True)
        version = IntegerField()
        updated_at = CharField(max_length=24)
        updated_by = CharField(max_length=36, null=True)

        class Meta:
            database = db
            table_name = "settings_values"

    class ChangeRow(Model):
        id = CharField(primary_key=True, max_length=36)
        category = CharField(max_length=64)
        key = CharField(max_length=64)
        before = TextField(null=True)
        after = TextField(null=True)
        by = CharField(max_length=36, null=True)
        at = CharField(max_length=24)

        class Meta:
            database = db
            table_name = "settings_history"
            indexes = ((("at", "id"), False), (("category", "key", "at", "id"), False))

    class StateRow(Model):
        id = IntegerField(primary_key=True)
        version = BigIntegerField()

        class Meta:
            database = db
            table_name = "settings_state"

    class OutdatedRow(Model):
        process = CharField(primary_key=True, max_length=36)
        names = TextField()
        seen_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            table_name = "settings_outdated"

    db.create_tables([ValueRow, ChangeRow, StateRow, OutdatedRow])
