"""Create the tables of the `cost` plugin."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Create the tables and indexes."""

    class CostEvent(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        ts = peewee.CharField(max_length=24)
        usage_key = peewee.CharField(max_length=200)
        by_gateway = peewee.BooleanField()
        private_to = peewee.CharField(max_length=36, null=True)
        user_id = peewee.CharField(max_length=36, null=True)
        agent_id = peewee.CharField(max_length=36, null=True)
        task_id = peewee.CharField(max_length=36, null=True)
        attempt_id = peewee.CharField(max_length=36, null=True)
        run_id = peewee.CharField(max_length=36, null=True)
        conversation_id = peewee.CharField(max_length=36, null=True)
        provider = peewee.CharField(max_length=64)
        model = peewee.CharField(max_length=200)
        operation = peewee.CharField(max_length=10)
        input_tokens = peewee.BigIntegerField()
        output_tokens = peewee.BigIntegerField()
        cache_read_tokens = peewee.BigIntegerField()
        cache_write_tokens = peewee.BigIntegerField()
        cost_micro = peewee.BigIntegerField(null=True)
        price_source = peewee.CharField(max_length=10, null=True)
        price_version = peewee.CharField(max_length=60, null=True)
        estimated = peewee.BooleanField()
        note = peewee.CharField(max_length=500)

        class Meta:
            database = db
            table_name = "cost_events"
            legacy_table_names = False
            indexes = (
                (("usage_key", "by_gateway"), True),
                (("ts", "id", "private_to"), False),
                (("provider", "ts", "private_to"), False),
                (("model", "ts", "provider", "private_to"), False),
            )

    class Price(peewee.Model):
        id = peewee.CharField(max_length=36, primary_key=True)
        version = peewee.IntegerField()
        created_at = peewee.CharField(max_length=24)
        updated_at = peewee.CharField(max_length=24)
        provider = peewee.CharField(max_length=64)
        model = peewee.CharField(max_length=200)
        valid_from = peewee.CharField(max_length=24)
        input_micro = peewee.BigIntegerField()
        output_micro = peewee.BigIntegerField()
        cache_read_micro = peewee.BigIntegerField(null=True)
        cache_write_micro = peewee.BigIntegerField(null=True)
        call_micro = peewee.BigIntegerField()

        class Meta:
            database = db
            table_name = "cost_prices"
            legacy_table_names = False
            indexes = ((("provider", "model", "valid_from"), True),)

    class PriceRevision(peewee.Model):
        id = peewee.IntegerField(primary_key=True)
        revision = peewee.BigIntegerField()

        class Meta:
            database = db
            table_name = "cost_price_revisions"
            legacy_table_names = False

    class Rollup(peewee.Model):
        series = peewee.CharField(max_length=120)
        period = peewee.BigIntegerField()
        key = peewee.CharField(max_length=64)
        subkey = peewee.CharField(max_length=200)
        shard = peewee.SmallIntegerField()
        events = peewee.BigIntegerField()
        calls = peewee.BigIntegerField()
        cost_micro = peewee.BigIntegerField()
        input_tokens = peewee.BigIntegerField()
        output_tokens = peewee.BigIntegerField()
        cache_read_tokens = peewee.BigIntegerField()
        cache_write_tokens = peewee.BigIntegerField()
        unpriced_calls = peewee.BigIntegerField()
        unpriced_tokens = peewee.BigIntegerField()
        tasks = peewee.BigIntegerField()
        completed = peewee.BigIntegerField()
        wasted_micro = peewee.BigIntegerField()

        class Meta:
            database = db
            table_name = "cost_rollups"
            legacy_table_names = False
            primary_key = peewee.CompositeKey("series", "period", "key", "subkey", "shard")
            indexes = ((("period",), False),)

    class DeletedAgent(peewee.Model):
        agent_id = peewee.CharField(max_length=36, primary_key=True)
        name = peewee.CharField(max_length=200)

        class Meta:
            database = db
            table_name = "cost_deleted_agents"
            legacy_table_names = False

    db.create_tables([CostEvent, Price, PriceRevision, Rollup, DeletedAgent])
    db.execute_sql("CREATE INDEX cost_rollups_task ON cost_rollups (key) WHERE (series = 'task')")
    for name in ("task", "agent", "user"):
        db.execute_sql(
            f"CREATE INDEX cost_events_{name} ON cost_events ({name}_id, ts, private_to) WHERE ({name}_id IS NOT NULL)"
        )
