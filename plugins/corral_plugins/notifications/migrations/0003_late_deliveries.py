"""Adds an index on overdue deliveries, so that finding them does not require reading all waiting deliveries."""

from __future__ import annotations

from typing import Any

from peewee import CharField, Model, ModelIndex


def up(migrator: Any, db: Any) -> None:
    class Delivery(Model):
        ready_at = CharField(max_length=24, null=True)
        due_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_deliveries"

    waiting = Delivery.due_at.is_null(False)
    db.execute(ModelIndex(Delivery, (Delivery.ready_at,), where=waiting, name="notifications_deliveries_late"))
