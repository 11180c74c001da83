"""Create the table that stores the last known state of each health check."""

from __future__ import annotations

from peewee import BooleanField, CharField, Model


def up(migrator, db):
    class Health(Model):
        name = CharField(primary_key=True, max_length=60)
        status = CharField(max_length=10)
        since = CharField(max_length=24)
        alerted = BooleanField(default=False)

        class Meta:
            database = db
            table_name = "health_checks"

    db.create_tables([Health])
