"""Creates the table that tracks events whose recipients cannot all be notified in one unit of work."""

from __future__ import annotations

from typing import Any

from peewee import CharField, Model


def up(migrator: Any, db: Any) -> None:
    class Progress(Model):
        event_id = CharField(primary_key=True, max_length=36)
        user_id = CharField(max_length=36)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "notifications_progress"

    db.create_tables([Progress])
