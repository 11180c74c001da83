"""Create the table for the kill switch."""

from __future__ import annotations

from typing import Any

from peewee import BooleanField, CharField, IntegerField, Model, TextField


def up(migrator: Any, db: Any) -> None:
    class KillSwitchRow(Model):
        id = IntegerField(primary_key=True)
        engaged = BooleanField(default=False)
        mode = CharField(max_length=10, default="pause")
        hold_deliveries = BooleanField(default=False)
        reason = TextField(null=True)
        engaged_by = CharField(max_length=36, null=True)
        engaged_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            table_name = "admin_kill_switch"

    db.create_tables([KillSwitchRow])
