"""Rollups: totals that are updated together with the cost events, so that reports do not need to add up events.

A unit of work writes all its increments at its end, in one statement and sorted by key, so that rows are locked only
briefly and deadlocks cannot occur. The order of increments does not affect the result. The increments of frequently
changed rows are spread over several rows (shards), so that concurrent units of work do not wait for each other.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import peewee
from peewee import fn

from corral.database.dialect import counter_shard
from corral.database.statement import Parameter, Statement
from corral.database.unit import before_commit, current
from corral.events.log import LoggedEvent
from corral_plugins.cost.models import IS_TASK_ROLLUP, CostEvent, DeletedAgent, Rollup
from corral_plugins.cost.service.day_buckets import QUARTER_HOURS_PER_DAY, OffsetSpan, day_of, month_of, quarter_hour_of

SHARDS = 4
BATCH_ROWS = 100


class RollupCounters(NamedTuple):
    """The counters of a rollup, or their sums over several rollups."""

    events: int = 0
    calls: int = 0
    cost_micro: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    unpriced_calls: int = 0
    unpriced_tokens: int = 0
    tasks: int = 0
    completed: int = 0
    wasted_micro: int = 0

    def add(self, other: RollupCounters) -> RollupCounters:
        """Return the sum of both objects, counter by counter."""
        return RollupCounters(*map(operator.add, self, other))


ZERO = RollupCounters()
COUNTERS = RollupCounters._fields

# Series by UTC day. The key of MODEL is the provider and its subkey the model; the subkey of TASK is the agent.
AGENT, MODEL, USER, TASK, WORKFLOW = "agent", "model", "user", "task", "workflow"
DAILY_SERIES = (AGENT, MODEL, USER, TASK)
# The costs of each agent by UTC month.
AGENT_MONTH = "agent_month"
# Series without a period: by provider, by task (subkey: agent), and events that only one user may see.
TOTAL, TASK_TOTAL, PRIVATE = "total", "task_total", "private"
ALL_TIME = 0
QUARTER_HOURLY = "quarter_hour:"
_SHARDED = frozenset({AGENT, AGENT_MONTH, MODEL, TOTAL, WORKFLOW})
"""The series whose rows are sharded, because concurrent units of work often update them.

The rows of the quarter-hour series are sharded too.
"""


class RollupKey(NamedTuple):
    """The key of a row in the `cost_rollups` table, without the shard."""

    series: str
    period: int
    key: str
    subkey: str = ""


Row = Mapping[str, Any]
Increments = Mapping[str, int]


# -- writing


def quarter_hour_series_name(agent_id: str = "", provider: str = "") -> str:
    """Return the name of the quarter-hour series for all events, or for those of one agent, one provider, or both."""
    return f"{QUARTER_HOURLY}{agent_id}:{provider}"


def increments_of(event: Row) -> dict[str, int]:
    """Return the amounts by which an event (a row in `cost_events`) increments the counters of each of its rollups."""
    names = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
    tokens = {name: int(event[name]) for name in names}
    cost = event["cost_micro"]
    if cost is None:
        return {"events": 1, "calls": 1, "unpriced_calls": 1, "unpriced_tokens": sum(tokens.values()), **tokens}
    return {"events": 1, "calls": 0 if cost < 0 else 1, "cost_micro": cost, **tokens}


def keys_of(event: Row) -> list[RollupKey]:
    """Return the keys of the rollups to which an event is added."""
    day, quarter_hour = day_of(event["ts"]), quarter_hour_of(event["ts"])
    agent, task, provider = event["agent_id"] or "", event["task_id"], event["provider"]
    quarter_hourly = {quarter_hour_series_name(*names) for names in itertools.product({"", agent}, ("", provider))}
    keys = [
        *(RollupKey(series, quarter_hour, "") for series in quarter_hourly),
        RollupKey(AGENT, day, agent),
        RollupKey(MODEL, day, provider, event["model"]),
        RollupKey(USER, day, event["user_id"] or ""),
        RollupKey(TOTAL, ALL_TIME, provider),
    ]
    if agent:
        keys.append(RollupKey(AGENT_MONTH, month_of(event["ts"]), agent))
    if task is not None:
        keys += [RollupKey(TASK, day, task, agent), RollupKey(TASK_TOTAL, ALL_TIME, task, agent)]
    if event["private_to"] is not None:
        keys.append(RollupKey(PRIVATE, ALL_TIME, event["private_to"]))
    return keys


_INSERT_TASK = Statement(
    lambda p: (
        Rollup.insert(series=TASK_TOTAL, period=ALL_TIME, key=p("task"), subkey=p("agent"), shard=0)
        .on_conflict_ignore()
        .returning(Rollup.key)
    )
)


def add_event(event: Row, workflow_id: str | None = None) -> None:
    """Add a new event to all its rollups at the end of the unit of work.

    If a workflow run caused the event, the caller passes `workflow_id`, because the event itself contains only the id
    of the run.
    """
    keys = keys_of(event)
    if workflow_id is not None:
        keys.append(RollupKey(WORKFLOW, day_of(event["ts"]), workflow_id))
    before_commit(_PendingIncrement(keys, increments_of(event)))
    agent, task = event["agent_id"] or "", event["task_id"]
    if task is not None and _INSERT_TASK.one({"task": task, "agent": agent}) is not None:
        before_commit(_PendingIncrement([RollupKey(AGENT, day_of(event["ts"]), agent)], {"tasks": 1}))


class _PendingIncrement:
    """The increments of one event, which are written at the end of the unit of work.

    A unit of work may collect the increments of several events. The last instance writes the increments of all
    instances. Rolling back to a savepoint discards the instances that were created after it.
    """

    def __init__(self, keys: Iterable[RollupKey], increments: Increments) -> None:
        self.keys, self.increments = tuple(keys), increments

    def __call__(self) -> None:
        pending = [each for each in current().before if isinstance(each, _PendingIncrement)]
        if pending[-1] is self:
            merged: dict[RollupKey, Counter[str]] = {}
            for each in pending:
                for key in each.keys:
                    merged.setdefault(key, Counter()).update(each.increments)
            increment_rollups(merged)


def increment_rollups(merged: Mapping[RollupKey, Increments]) -> None:
    """Add increments to rollups immediately."""
    own_shard = counter_shard(SHARDS)
    rows = sorted((key, own_shard if _is_sharded(key.series) else 0) for key in merged)
    for start in range(0, len(rows), BATCH_ROWS):
        values: dict[str, Any] = {}
        batch = rows[start : start + BATCH_ROWS]
        for n, (key, shard) in enumerate(batch):
            values |= {f"{name}{n}": value for name, value in zip(_PRIMARY_KEY, (*key, shard), strict=True)}
            values |= {f"{name}{n}": merged[key].get(name, 0) for name in COUNTERS}
        _upsert_statement(len(batch)).run(values)


_PRIMARY_KEY = ("series", "period", "key", "subkey", "shard")


def _is_sharded(series: str) -> bool:
    return series in _SHARDED or series.startswith(QUARTER_HOURLY)


@functools.lru_cache(maxsize=BATCH_ROWS)
def _upsert_statement(size: int) -> Statement:
    def build(p: Parameter) -> peewee.Query:
        rows = [{getattr(Rollup, name): p(f"{name}{n}") for name in (*_PRIMARY_KEY, *COUNTERS)} for n in range(size)]
        target = [getattr(Rollup, name) for name in _PRIMARY_KEY]
        update = {getattr(Rollup, name): getattr(Rollup, name) + getattr(peewee.EXCLUDED, name) for name in COUNTERS}
        return Rollup.insert_many(rows).on_conflict(conflict_target=target, update=update)

    return Statement(build)


# outcomes of tasks, read from the event log, because `cost` may be inactive when the tasks end

OUTCOME_EVENTS = ("task.completed", "task.failed", "task.cancelled", "task.retried", "agent.deleted")


def record_outcome_event(event: LoggedEvent) -> None:
    """Update the outcome counters for a task event, or store the name of a deleted agent.

    A completed task is counted. The costs of a failed, cancelled or retried task are counted as wasted.
    """
    payload = event.payload()
    if event.type == "agent.deleted":
        row = {"agent_id": payload["agent_id"], "name": payload["name"][:200]}
        DeletedAgent.insert(**row).on_conflict_ignore().execute()
    elif event.type == "task.completed":
        _increment_outcome(event, payload, {"completed": 1})
    elif event.type != "task.retried" or payload["source"] == "policy":  # a manual retry follows a recorded failure
        _add_waste(event, payload)


def _add_waste(event: LoggedEvent, payload: dict[str, Any]) -> None:
    """Count as wasted the costs that a task caused before the event, unless they were already counted."""
    task_id = payload["task_id"]
    total = all_time_total(TASK_TOTAL, task_id)  # old events may already be deleted
    later = CostEvent.select(fn.SUM(CostEvent.cost_micro)).where(CostEvent.task_id == task_id, CostEvent.ts > event.ts)
    wasted = total.cost_micro - int(later.scalar() or 0) - total.wasted_micro
    if wasted:
        _increment_outcome(event, payload, {"wasted_micro": wasted}, RollupKey(TASK_TOTAL, ALL_TIME, task_id))


def _increment_outcome(event: LoggedEvent, payload: dict[str, Any], increments: Increments, *more: RollupKey) -> None:
    """Increment the outcome counters, which count completed tasks and wasted costs.

    The rollups are updated immediately, because the next event in the same unit of work reads them.
    """
    keys = (RollupKey(AGENT, day_of(event.ts), payload["agent_id"] or ""), RollupKey(TOTAL, ALL_TIME, ""), *more)
    increment_rollups(dict.fromkeys(keys, increments))


# -- reading


SUM_COLUMNS = [fn.SUM(getattr(Rollup, name)) for name in COUNTERS]


def _in_periods(p: Parameter) -> peewee.Expression:
    return (Rollup.series == p("series")) & (Rollup.period >= p("first")) & (Rollup.period < p("end"))


_LOCAL_DAYS = Statement(
    lambda p: (
        Rollup.select((Rollup.period + p("offset")) / QUARTER_HOURS_PER_DAY, *SUM_COLUMNS)
        .where(_in_periods(p))
        .group_by(peewee.SQL("1"))
        .tuples()
    )
)
_UTC_DAYS = Statement(
    lambda p: Rollup.select(Rollup.period, *SUM_COLUMNS).where(_in_periods(p)).group_by(Rollup.period).tuples()
)
_UTC_DAYS_OF_KEY = Statement(
    lambda p: (
        Rollup.select(Rollup.period, *SUM_COLUMNS)
        .where(_in_periods(p) & (Rollup.key == p("key")))
        .group_by(Rollup.period)
        .tuples()
    )
)
_TOTAL_OF_KEY = Statement(
    lambda p: (
        Rollup.select(*SUM_COLUMNS)
        .where((Rollup.series == p("series")) & (Rollup.period == ALL_TIME) & (Rollup.key == p("key")))
        .tuples()
    )
)
_GROUPS = Statement(
    lambda p: (
        Rollup.select(Rollup.key, Rollup.subkey, *SUM_COLUMNS)
        .where(_in_periods(p))
        .group_by(Rollup.key, Rollup.subkey)
        .tuples()
    )
)
_COSTLIEST_TASKS = Statement(
    lambda p: (
        Rollup.select(Rollup.key, fn.SUM(Rollup.cost_micro))
        .where(_task_in_periods(p))
        .group_by(Rollup.key)
        .order_by(peewee.SQL("2 DESC"), Rollup.key)
        .limit(p("limit"))
        .offset(p("offset"))
        .tuples()
    )
)
_COUNT_TASKS = Statement(lambda p: Rollup.select(fn.COUNT(Rollup.key.distinct())).where(_task_in_periods(p)).tuples())


def _task_in_periods(p: Parameter) -> peewee.Expression:
    # Adding 0 keeps planners from the index of the periods, which would make them sort.
    day = Rollup.period + 0
    return IS_TASK_ROLLUP & (day >= p("first")) & (day < p("end"))


def _counters_of_row(values: Iterable[Any]) -> RollupCounters:
    """Convert a row with the columns `SUM_COLUMNS` to `RollupCounters`.

    Sums over no rows are null, and some database engines return decimals.
    """
    return RollupCounters(*(int(value or 0) for value in values))


def totals_by_local_day(
    spans: Iterable[OffsetSpan], *, agent_id: str = "", provider: str = ""
) -> dict[int, RollupCounters]:
    """Return the totals of each local day in the given time ranges, keyed by day number.

    The totals cover all events, or only those of one agent, one provider, or both. Days without rows are absent.
    """
    days: dict[int, RollupCounters] = {}
    for span in spans:
        for day, *values in _totals_of_days(span, agent_id, provider):
            days[int(day)] = days.get(int(day), ZERO).add(_counters_of_row(values))
    return days


def _totals_of_days(span: OffsetSpan, agent_id: str, provider: str) -> list[tuple[Any, ...]]:
    """Return the totals of each day in a time range with a constant UTC offset.

    Days in UTC have their own rollups. The totals of days in other time zones are summed up from the rollups of quarter
    hours.
    """
    first, first_rest = divmod(span.first, QUARTER_HOURS_PER_DAY)
    end, end_rest = divmod(span.end, QUARTER_HOURS_PER_DAY)
    if span.offset or first_rest or end_rest or (agent_id and provider):
        bounds = {"first": span.first, "end": span.end, "offset": span.offset}
        return _LOCAL_DAYS.rows({**bounds, "series": quarter_hour_series_name(agent_id, provider)})
    days = {"first": first, "end": end, "series": AGENT if agent_id else MODEL}
    key = agent_id or provider
    return _UTC_DAYS_OF_KEY.rows({**days, "key": key}) if key else _UTC_DAYS.rows(days)


def all_time_total(series: str, key: str) -> RollupCounters:
    """Return the totals of one key in a series that stores only all-time totals."""
    return _counters_of_row(_TOTAL_OF_KEY.one({"series": series, "key": key}) or ())


def grouped_totals(series: str, first: int = ALL_TIME, last: int = ALL_TIME) -> list[tuple[str, str, RollupCounters]]:
    """Return `(key, subkey, totals)` for every key of a series, summed over the periods from `first` to `last`."""
    rows = _GROUPS.rows({"series": series, "first": first, "end": last + 1})
    return [(key, subkey, _counters_of_row(values)) for key, subkey, *values in rows]


def costs_in_month(month: int, agent_ids: Sequence[str]) -> dict[str, int]:
    """Return the cost of each of the given agents in a month, in micro-USD. Agents without costs are absent."""
    in_month = (Rollup.series == AGENT_MONTH) & (Rollup.period == month) & Rollup.key.in_(list(agent_ids))
    found: Any = Rollup.select(Rollup.key, fn.SUM(Rollup.cost_micro)).where(in_month).group_by(Rollup.key).tuples()
    return {agent_id: int(cost) for agent_id, cost in found} if agent_ids else {}


def costliest_tasks(first: int, last: int, *, limit: int, offset: int) -> tuple[list[tuple[str, RollupCounters]], int]:
    """Return a page of the tasks with costs in a range of days, most expensive first, and the number of such tasks.

    `first` and `last` are the numbers of the first and last day. Reading all counters of all tasks could take too long.
    Tasks are therefore sorted by cost alone, and the other counters are read only for the tasks on the page.
    """
    bounds = {"first": first, "end": last + 1}
    task_ids = [key for key, _ in _COSTLIEST_TASKS.rows({**bounds, "limit": limit, "offset": offset})]
    in_page = Rollup.key.in_(task_ids) & IS_TASK_ROLLUP & Rollup.period.between(first, last)
    rows: Any = Rollup.select(Rollup.key, *SUM_COLUMNS).where(in_page).group_by(Rollup.key).tuples() if task_ids else ()
    totals = {task_id: _counters_of_row(values) for task_id, *values in rows}
    count = _COUNT_TASKS.one(bounds)
    return [(task_id, totals[task_id]) for task_id in task_ids], int(count[0]) if count is not None else 0
