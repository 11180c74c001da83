"""Create the table of the `backup` plugin."""

from __future__ import annotations

from peewee import CharField, IntegerField, Model


def up(migrator, db):
    class LastBackupRow(Model):
        id = IntegerField(primary_key=True)
        finished_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "backup_last"

    db.create_tables([LastBackupRow])
