"""Create the tables for disabled plugins and for quarantined plugins."""

from __future__ import annotations

from peewee import CharField, IntegerField, Model, TextField


def up(migrator, db):
    class PluginState(Model):
        name = CharField(max_length=64, primary_key=True)
        state = CharField(max_length=16)
        reason = TextField(null=True)
        since = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "plugin_admin_states"

    class Quarantine(Model):
        name = CharField(max_length=64, primary_key=True)
        state = CharField(max_length=16)
        reason = TextField()
        since = CharField(max_length=24)
        probes = IntegerField(default=0)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "plugin_admin_quarantines"

    db.create_tables([PluginState, Quarantine])
