"""The tables of costs: events as they came, prices that win over the built-in table, and sums kept with the events."""

from __future__ import annotations

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, Model


class CostEvent(Model):
    """One use of money, never changed. `cost_micro` is null when nobody knew a price.

    `by_gateway`: a call of the gateway, whose key is its id; what is reported cannot take such a key.

    `private_to` is the person whose private conversation or direct use it was; null: every reader sees it.
    """

    visibility = PRIVATE
    owner_field = "private_to"

    id = IdField(primary_key=True)
    ts = InstantField()
    usage_key = peewee.CharField(max_length=200)
    by_gateway = peewee.BooleanField(default=False)
    private_to = IdField(null=True)
    user_id = IdField(null=True)
    agent_id = IdField(null=True)
    task_id = IdField(null=True)
    attempt_id = IdField(null=True)
    run_id = IdField(null=True)
    conversation_id = IdField(null=True)
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
        table_name = "cost_events"
        indexes = (
            (("usage_key", "by_gateway"), True),
            # `private_to` at the end: counting what a reader sees stays in the index.
            (("ts", "id", "private_to"), False),
            (("provider", "ts", "private_to"), False),
            (("model", "ts", "provider", "private_to"), False),
        )


for _column, _name in (
    (CostEvent.task_id, "cost_events_task"),
    (CostEvent.agent_id, "cost_events_agent"),
    (CostEvent.user_id, "cost_events_user"),
):
    _some = _column.is_null(False)
    CostEvent.add_index(CostEvent.index(_column, CostEvent.ts, CostEvent.private_to, name=_name, where=_some))


class Price(Model):
    """A price that an admin set: micro-USD per 1,000,000 tokens, `call_micro` per call.

    Null cache prices are those of input. `provider` and `model` are globs (`*`, `?`).
    """

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    created_at = InstantField()
    updated_at = InstantField()
    provider = peewee.CharField(max_length=64)
    model = peewee.CharField(max_length=200)
    valid_from = InstantField()
    input_micro = peewee.BigIntegerField()
    output_micro = peewee.BigIntegerField()
    cache_read_micro = peewee.BigIntegerField(null=True)
    cache_write_micro = peewee.BigIntegerField(null=True)
    call_micro = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "cost_prices"
        indexes = ((("provider", "model", "valid_from"), True),)


class PriceEdition(Model):
    """One row that counts the changes of `cost_prices`, so that a process knows whether its copy is the present one."""

    id = peewee.IntegerField(primary_key=True)
    n = peewee.BigIntegerField()

    class Meta:
        table_name = "cost_price_editions"


class Sum(Model):
    """What came together in one period: the sum over all shards. `service/sums.py` names the series.

    `period` counts days or quarters of an hour since 1970, UTC; 0 in series of all time. `events` counts all, `calls`
    those that are no corrections, `tasks` those that began to cost. `completed` and `wasted_micro` come from the ends
    of tasks.
    """

    series = peewee.CharField(max_length=120)
    period = peewee.BigIntegerField()
    key = peewee.CharField(max_length=64)
    part = peewee.CharField(max_length=200)
    shard = peewee.SmallIntegerField()
    events = peewee.BigIntegerField(default=0)
    calls = peewee.BigIntegerField(default=0)
    cost_micro = peewee.BigIntegerField(default=0)
    input_tokens = peewee.BigIntegerField(default=0)
    output_tokens = peewee.BigIntegerField(default=0)
    cache_read_tokens = peewee.BigIntegerField(default=0)
    cache_write_tokens = peewee.BigIntegerField(default=0)
    unpriced_calls = peewee.BigIntegerField(default=0)
    unpriced_tokens = peewee.BigIntegerField(default=0)
    tasks = peewee.BigIntegerField(default=0)
    completed = peewee.BigIntegerField(default=0)
    wasted_micro = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "cost_sums"
        primary_key = peewee.CompositeKey("series", "period", "key", "part", "shard")
        indexes = ((("period",), False),)


Sum.add_index(Sum.index(Sum.key, name="cost_sums_task", where=peewee.SQL("series = 'task'")))


class DeletedAgent(Model):
    """The name that an agent had."""

    agent_id = IdField(primary_key=True)
    name = peewee.CharField(max_length=200)

    class Meta:
        table_name = "cost_deleted_agents"


TABLES: tuple[type[Model], ...] = (CostEvent, Price, PriceEdition, Sum, DeletedAgent)
