"""Create the table that stores the fetched price table."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Create the table."""

    class FetchedPriceTable(peewee.Model):
        id = peewee.IntegerField(primary_key=True)
        fetched_at = peewee.CharField(max_length=24)
        data = peewee.TextField()

        class Meta:
            database = db
            table_name = "cost_price_table"
            legacy_table_names = False

    db.create_tables([FetchedPriceTable])
