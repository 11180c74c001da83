"""The proof that the sums are those of their events."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from corral import clock
from corral.database.dialect import epoch_seconds, execute
from corral.events.event import SystemAlert, emit
from corral_plugins.cost.service import sums
from corral_plugins.cost.service.days import DAY, QUARTER, QUARTERS_A_DAY
from corral_plugins.cost.service.sums import AGENT, ALL_TIME, MODEL, TASK, TASK_TOTAL, TOTAL, USER, Place

log = logging.getLogger("corral.cost")

QUARTERS = "quarter"
KINDS = (AGENT, MODEL, USER, TASK, QUARTERS)
AT_ONCE = 500

Differences = dict[Place, dict[str, int]]

_FIGURES = {
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
_AGENT = "COALESCE(agent_id, '')"

# One statement, so that events and sums are of one moment. What differs is the events' side less the sums' side.
_DIFFERENCES = """
SELECT series, period, key, part, {together} FROM (
  {events}
  UNION ALL
  SELECT series, period, key, part, {less} FROM cost_sums WHERE {which}
) AS sides GROUP BY series, period, key, part HAVING {differ} LIMIT {at_once}
"""
_EVENTS = """
SELECT {series} AS series, {period} AS period, {key} AS key, {part} AS part, {figures}
FROM cost_events WHERE ts >= ? AND ts < ? AND {some}
"""


def differences(kind: str, day: int) -> Differences:
    """What the sums of a kind lack (or have too much, negative) of the events of a UTC day; at most `AT_ONCE` rows."""
    quarter = f"{epoch_seconds('ts')} / {QUARTER}"
    figures = ", ".join(f"{expression} AS {name}" for name, expression in _FIGURES.items())
    sides = [
        _EVENTS.format(series=series, period=period, key=key, part=part, some=some, figures=figures)
        for series, period, key, part, some in _places(kind, day, quarter)
    ]
    first = day * QUARTERS_A_DAY
    which = (
        f"period >= {first} AND period < {first + QUARTERS_A_DAY}"
        if kind == QUARTERS
        else (f"series = '{kind}' AND period = {day}")
    )
    sql = _DIFFERENCES.format(
        events=" UNION ALL ".join(sides),
        which=which,
        at_once=AT_ONCE,
        together=", ".join(f"SUM({name})" for name in _FIGURES),
        less=", ".join(f"-{name}" for name in _FIGURES),
        differ=" OR ".join(f"SUM({name}) <> 0" for name in _FIGURES),
    )
    bounds = [clock.format_instant(day * DAY), clock.format_instant((day + 1) * DAY)]
    rows: Iterable[Any] = execute(sql, bounds * len(sides)).fetchall()
    return {
        Place(series, int(period), key, part): dict(zip(_FIGURES, map(int, values), strict=True))
        for series, period, key, part, *values in rows
    }


def _places(kind: str, day: int, quarter: str) -> list[tuple[str, str, str, str, str]]:
    """`series, period, key, part` of an event as SQL, and which events have such a row (`sums.places_of`)."""
    if kind != QUARTERS:
        keys = {
            AGENT: (_AGENT, "''", "1 = 1"),
            MODEL: ("provider", "model", "1 = 1"),
            USER: ("COALESCE(user_id, '')", "''", "1 = 1"),
            TASK: ("task_id", _AGENT, "task_id IS NOT NULL"),
        }
        return [(f"'{kind}'", str(day), *keys[kind])]
    with_agent = "agent_id IS NOT NULL"
    return [
        (f"'{QUARTERS}:' || {agent} || ':' || {provider}", quarter, "''", "''", some)
        for agent, provider, some in (
            ("''", "''", "1 = 1"),
            ("''", "provider", "1 = 1"),
            ("agent_id", "''", with_agent),
            ("agent_id", "provider", with_agent),
        )
    ]


def correct(found: Differences) -> None:
    """Add what is missing, to the sums of all time too, and tell. What was added meanwhile is not touched."""
    of_all_time: dict[Place, Counter[str]] = {}
    for place, figures in found.items():
        series = {MODEL: TOTAL, TASK: TASK_TOTAL}.get(place.series)
        if series is not None:
            part = place.part if series == TASK_TOTAL else ""
            of_all_time.setdefault(Place(series, ALL_TIME, place.key, part), Counter()).update(figures)
    sums.write({**found, **of_all_time})
    place, figures = next(iter(found.items()))
    detail = f"{len(found)} sums were not those of their events and were corrected; first {tuple(place)}: {figures}."
    log.error("sums of costs were wrong and have been corrected", extra={"found": detail})
    alert = SystemAlert(
        kind="cost_mismatch", severity="warning", title="Sums of costs have been corrected", detail=detail[:2000]
    )
    emit(alert, object=("cost", place.series))
