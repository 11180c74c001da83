"""The tables for cost accounting: cost events, rollups, prices, budgets, and names of deleted agents."""

from __future__ import annotations

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, JSONField, Model


class CostEvent(Model):
    """One cost event. Rows never change. `cost_micro` is null if no price was known.

    `by_gateway` marks calls of the LLM gateway, whose `usage_key` is the id of the call. Keys are unique among the
    calls of the gateway and, separately, among all other events. `private_to` is the user whose private conversation or
    direct call caused the cost. If `private_to` is null, everybody who may read costs sees the event.
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
            # `private_to` comes last so that the index alone suffices to count the rows that a reader may see.
            (("ts", "id", "private_to"), False),
            (("provider", "ts", "private_to"), False),
            (("model", "ts", "provider", "private_to"), False),
        )


for _column, _name in (
    (CostEvent.task_id, "cost_events_task"),
    (CostEvent.agent_id, "cost_events_agent"),
    (CostEvent.user_id, "cost_events_user"),
):
    _is_set = _column.is_null(False)
    CostEvent.add_index(CostEvent.index(_column, CostEvent.ts, CostEvent.private_to, name=_name, where=_is_set))


class PriceOverrideRow(Model):
    """A price override set by an admin, in micro-USD per 1,000,000 tokens. `call_micro` is charged per call.

    If a cache price is null, the input price applies. `provider` and `model` are glob patterns (`*`, `?`).
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


class PriceRevision(Model):
    """A single row that counts the changes to the `cost_prices` table.

    Processes compare the count with the revision in their cache.
    """

    id = peewee.IntegerField(primary_key=True)
    revision = peewee.BigIntegerField()

    class Meta:
        table_name = "cost_price_revisions"


class FetchedPriceTable(Model):
    """A single row with the most recently fetched price table, as compressed and Base64-encoded JSON."""

    id = peewee.IntegerField(primary_key=True)
    fetched_at = InstantField()
    data = peewee.TextField()

    class Meta:
        table_name = "cost_price_table"


class Rollup(Model):
    """The totals for one key of a series, such as an agent, in one period.

    Totals that change often are spread over several rows (shards), which are added up when they are read. `period` is
    the number of a UTC day, of a quarter hour since 1970 or of a UTC month, or 0 for all-time totals. `events` counts
    all events, and `calls` counts the events that are not corrections. `tasks` counts each task once, when its first
    cost is recorded. `completed` and `wasted_micro` are updated when tasks end.
    """

    series = peewee.CharField(max_length=120)
    period = peewee.BigIntegerField()
    key = peewee.CharField(max_length=64)
    subkey = peewee.CharField(max_length=200)
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
        table_name = "cost_rollups"
        primary_key = peewee.CompositeKey("series", "period", "key", "subkey", "shard")
        indexes = ((("period",), False),)


# The report by task reads this index alone, in the order of the tasks, and so sorts nothing in order to group them. The
# condition appends an empty string so that only this index can serve it. For the plain column, planners without
# statistics would choose the primary key.
IS_TASK_ROLLUP = peewee.SQL("series || '' = 'task'")
Rollup.add_index(
    Rollup.index(
        Rollup.key, Rollup.period, Rollup.cost_micro, Rollup.series, name="cost_rollups_task", where=IS_TASK_ROLLUP
    )
)


class DeletedAgent(Model):
    """The last name of a deleted agent, for use in reports."""

    agent_id = IdField(primary_key=True)
    name = peewee.CharField(max_length=200)

    class Meta:
        table_name = "cost_deleted_agents"


class Budget(Model):
    """The single row with the budget of the installation.

    `revision` changes whenever any limit changes, including the limits of agents. Processes compare it with the
    revision in their cache.
    """

    id = peewee.IntegerField(primary_key=True)
    version = peewee.IntegerField(default=1)
    revision = peewee.BigIntegerField(default=1)
    monthly_limit_micro = peewee.BigIntegerField(null=True)
    alert_thresholds = JSONField()
    mode = peewee.CharField(max_length=8)
    on_exceeded = peewee.CharField(max_length=16)
    timezone = peewee.CharField(max_length=64)

    class Meta:
        table_name = "cost_budget"


class AgentLimit(Model):
    """The monthly budget of an agent."""

    agent_id = IdField(primary_key=True)
    limit_micro = peewee.BigIntegerField()

    class Meta:
        table_name = "cost_agent_limits"


class BudgetCounter(Model):
    """The amounts spent and reserved in one period within a limit. `scope` is `global` or `agent`.

    `key` is the id of the agent, or empty for the installation.

    `spent_micro` is the sum of the cost events of the period, and `reserved_micro` is the sum of the unused parts of
    all reservations. `alerted` is the highest threshold that was reported, and `exceeded` is true if the event
    `budget.exceeded` was published. While `lifted` is true, the limit is ignored.
    """

    scope = peewee.CharField(max_length=8)
    key = peewee.CharField(max_length=36)
    period = peewee.CharField(max_length=7)
    limit_micro = peewee.BigIntegerField()
    spent_micro = peewee.BigIntegerField()
    reserved_micro = peewee.BigIntegerField()
    alerted = peewee.SmallIntegerField(default=0)
    exceeded = peewee.BooleanField(default=False)
    lifted = peewee.BooleanField(default=False)

    class Meta:
        table_name = "cost_budget_counters"
        primary_key = peewee.CompositeKey("scope", "key", "period")


class BudgetAlert(Model):
    """An alert that was sent. Each threshold is reported once per period, scope and agent."""

    scope = peewee.CharField(max_length=8)
    key = peewee.CharField(max_length=36)
    period = peewee.CharField(max_length=7)
    threshold = peewee.SmallIntegerField()
    sent_at = InstantField()

    class Meta:
        table_name = "cost_budget_alerts"
        primary_key = peewee.CompositeKey("scope", "key", "period", "threshold")


class Reservation(Model):
    """Money that is reserved for an attempt, or for a call without a task.

    `used_micro` is the cost of finished calls, and `drawn_micro` is the amount set aside for running calls.
    `limit_micro` is the amount that the task's cost limit leaves for the attempt, or null if the task has no cost
    limit.
    """

    id = IdField(primary_key=True)
    holder = peewee.CharField(max_length=8)
    holder_id = IdField(unique=True)
    lease_id = IdField(null=True)
    agent_id = IdField(null=True)
    task_id = IdField(null=True)
    amount_micro = peewee.BigIntegerField()
    used_micro = peewee.BigIntegerField(default=0)
    drawn_micro = peewee.BigIntegerField(default=0)
    limit_micro = peewee.BigIntegerField(null=True)
    created_at = InstantField()
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "cost_reservations"
        indexes = ((("created_at", "id"), False), (("agent_id",), False))


Reservation.add_index(
    Reservation.index(
        Reservation.lease_id, name="cost_reservations_lease", unique=True, where=Reservation.lease_id.is_null(False)
    )
)

TABLES: tuple[type[Model], ...] = (
    CostEvent,
    PriceOverrideRow,
    PriceRevision,
    FetchedPriceTable,
    Rollup,
    DeletedAgent,
    Budget,
    AgentLimit,
    BudgetCounter,
    BudgetAlert,
    Reservation,
)
