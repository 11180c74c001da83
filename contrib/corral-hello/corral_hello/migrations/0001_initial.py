"""Creates the table of greetings. The model in this file is a frozen copy from the first release."""

from __future__ import annotations

from typing import Any

from peewee import CharField, IntegerField, Model


def up(migrator: Any, db: Any) -> None:
    class Greeting(Model):
        name = CharField(primary_key=True, max_length=100)
        times = IntegerField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "hello_greetings"

    db.create_tables([Greeting])
