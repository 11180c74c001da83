"""Compares rollups with their events, corrects differences, and deletes data that is past its retention period."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import peewee

from corral import clock
from corral.database.dialect import epoch_seconds, execute
from corral.events.event import SystemAlert, emit
from corral_plugins.cost.models import CostEvent, Rollup
from corral_plugins.cost.service import rollups
from corral_plugins.cost.service.day_buckets import (
    DAY,
    FIRST_QUARTER_HOUR,
    QUARTER_HOUR,
    QUARTER_HOURS_PER_DAY,
    day_of,
    month_of,
)
from corral_plugins.cost.service.rollups import (
    AGENT,
    AGENT_MONTH,
    ALL_TIME,
    MODEL,
    PRIVATE,
    QUARTER_HOURLY,
    TASK,
    TASK_TOTAL,
    TOTAL,
    USER,
    RollupKey,
)

log = logging.getLogger("corral.cost")

RECONCILED_SERIES = (AGENT, MODEL, USER, TASK, QUARTER_HOURLY)
BATCH_ROWS = 500
DETAILED_DAYS = 400
"""The number of days for which quarter-hour rollups, and rollups by task and day, are kept.

Reports cover at most a year.
"""

Differences = dict[RollupKey, dict[str, int]]

_COUNTERS = {
    "events": "1",
    "calls": "CASE WHEN cost_micro < 0 THEN 0 ELSE 1 END",
    "cost_micro": "COALESCE(cost_micro, 0)",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cache_read_tokens": "cache_read_tokens",
    "cache_write_tokens": "cache_write_tokens",
    "unpriced_calls": "CASE WHEN cost_micro IS NULL THEN 1 ELSE 0 END",
    "unpriced_tokens": "CASE WHEN cost_micro IS NULL THEN"
    " input_tokens + output_tokens + cache_read_tokens + cache_write_tokens ELSE 0 END",
}
_AGENT_ID = "COALESCE(agent_id, '')"

# A single statement reads events and rollups at the same moment. A difference is events minus rollups.
_DIFFERENCES = """
SELECT series, period, key, subkey, {sums} FROM (
  {events}
  UNION ALL
  SELECT series, period, key, subkey, {negated} FROM cost_rollups WHERE {rollups}
) AS sides GROUP BY series, period, key, subkey HAVING {differ} LIMIT {limit}
"""
_EVENTS = """
SELECT {series} AS series, {period} AS period, {key} AS key, {subkey} AS subkey, {counters}
FROM cost_events WHERE ts >= ? AND ts < ? AND {condition}
"""


# -- reconciliation


def find_differences(series: str, day: int) -> Differences:
    """Return the amounts by which the rollups of a series differ from the cost events of a UTC day.

    A difference is positive if the rollup is too low, and negative if it is too high. At most `BATCH_ROWS` rollups are
    returned.
    """
    counters = ", ".join(f"{expression} AS {name}" for name, expression in _COUNTERS.items())
    events = [
        _EVENTS.format(**columns, counters=counters)
        for columns in _rollup_key_columns(series, day, f"{epoch_seconds('ts')} / {QUARTER_HOUR}")
    ]
    first = day * QUARTER_HOURS_PER_DAY
    sql = _DIFFERENCES.format(
        events=" UNION ALL ".join(events),
        rollups=f"period >= {first} AND period < {first + QUARTER_HOURS_PER_DAY}"
        if series == QUARTER_HOURLY
        else f"series = '{series}' AND period = {day}",
        limit=BATCH_ROWS,
        sums=", ".join(f"SUM({name})" for name in _COUNTERS),
        negated=", ".join(f"-{name}" for name in _COUNTERS),
        differ=" OR ".join(f"SUM({name}) <> 0" for name in _COUNTERS),
    )
    bounds = [clock.format_instant(day * DAY), clock.format_instant((day + 1) * DAY)]
    rows: Iterable[Any] = execute(sql, bounds * len(events)).fetchall()
    return {
        RollupKey(name, int(period), key, subkey): dict(zip(_COUNTERS, map(int, values), strict=True))
        for name, period, key, subkey, *values in rows
    }


def _rollup_key_columns(series: str, day: int, quarter_hour: str) -> list[dict[str, str]]:
    """Return SQL expressions for the rollup keys of a series, equivalent to `rollups.keys_of`.

    For each kind of rollup, the result contains the key columns and a condition that selects the events that are added
    to the rollup.
    """
    if series != QUARTER_HOURLY:
        key, subkey, condition = {
            AGENT: (_AGENT_ID, "''", "1 = 1"),
            MODEL: ("provider", "model", "1 = 1"),
            USER: ("COALESCE(user_id, '')", "''", "1 = 1"),
            TASK: ("task_id", _AGENT_ID, "task_id IS NOT NULL"),
        }[series]
        return [
            {"series": f"'{series}'", "period": str(day), "key": key, "subkey": subkey, "condition": condition},
        ]
    return [
        {
            "series": f"'{QUARTER_HOURLY}' || {agent} || ':' || {provider}",
            "period": quarter_hour,
            "key": "''",
            "subkey": "''",
            "condition": "1 = 1" if agent == "''" else "agent_id IS NOT NULL",
        }
        for agent in ("''", "agent_id")
        for provider in ("''", "provider")
    ]


def correct_rollups(found: Differences) -> None:
    """Add the differences to the daily rollups and to the matching monthly and all-time rollups, and raise an alert.

    Increments that other units of work write in the meantime are preserved.
    """
    longer: dict[RollupKey, Counter[str]] = {}
    for key, counters in found.items():
        if (matching := _longer_rollup(key)) is not None:
            longer.setdefault(matching, Counter()).update(counters)
    rollups.increment_rollups({**found, **longer})
    key, counters = next(iter(found.items()))
    detail = f"{len(found)} rollups differed from their events and were corrected; the first: {tuple(key)}: {counters}."
    log.error("cost rollups corrected", extra={"rollups": len(found), "detail": detail})
    alert = SystemAlert(
        kind="cost_mismatch", severity="warning", title="Cost totals were corrected", detail=detail[:2000]
    )
    emit(alert, object=("cost", key.series))


def _longer_rollup(key: RollupKey) -> RollupKey | None:
    """Return the monthly or all-time rollup that includes the events of a daily rollup, or None if there is none."""
    if key.series == AGENT and key.key:
        return RollupKey(AGENT_MONTH, month_of(clock.format_instant(key.period * DAY)), key.key)
    if key.series == MODEL:
        return RollupKey(TOTAL, ALL_TIME, key.key)
    return RollupKey(TASK_TOTAL, ALL_TIME, key.key, key.subkey) if key.series == TASK else None


# -- retention


def delete_events(before: str) -> int:
    """Delete at most `BATCH_ROWS` events older than the instant `before`, and return their number.

    The rollups keep the costs of deleted events.
    """
    columns = (CostEvent.id, CostEvent.provider, CostEvent.private_to)
    old: Any = CostEvent.select(*columns).where(CostEvent.ts < before).order_by(CostEvent.ts).limit(BATCH_ROWS)
    rows = list(old.tuples())
    if rows:
        CostEvent.delete().where(CostEvent.id.in_([row[0] for row in rows])).execute()
        deleted = Counter(RollupKey(TOTAL, ALL_TIME, provider) for _, provider, _ in rows)
        deleted.update(RollupKey(PRIVATE, ALL_TIME, user_id) for _, _, user_id in rows if user_id is not None)
        rollups.increment_rollups({key: {"events": -n} for key, n in deleted.items()})
    return len(rows)


def delete_quarter_hours() -> int:
    """Delete at most `BATCH_ROWS` quarter-hour rollups that are too old for any report, and return their number."""
    end = _first_detailed_day() * QUARTER_HOURS_PER_DAY
    return _delete_rollups((Rollup.period >= FIRST_QUARTER_HOUR) & (Rollup.period < end))


def delete_task_days() -> int:
    """Delete at most `BATCH_ROWS` expired rollups by task and day, and return their number.

    Totals per task are kept.
    """
    return _delete_rollups((Rollup.series == TASK) & (Rollup.period < _first_detailed_day()))


def _first_detailed_day() -> int:
    return day_of(clock.now()) - DETAILED_DAYS


def _delete_rollups(condition: Any) -> int:
    key = (Rollup.series, Rollup.period, Rollup.key, Rollup.subkey, Rollup.shard)
    old: Any = Rollup.select(*key).where(condition).limit(BATCH_ROWS).tuples()
    rows = list(old)
    return int(Rollup.delete().where(peewee.Tuple(*key).in_(rows)).execute()) if rows else 0
