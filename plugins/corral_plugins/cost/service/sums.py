"""Sums that are kept with the events, so that no read has to add them up.

Rows are added to at the end of the unit, all in one statement and in the order of their key, so that their locks are
short and never form a circle. Additions commute; sharded, so that units do not wait for each other.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import peewee

from corral.database.dialect import counter_shard
from corral.database.statement import Parameter, Statement
from corral.database.unit import before_commit, current
from corral_plugins.cost.models import Sum
from corral_plugins.cost.service.days import QUARTERS_A_DAY, Stretch, day_of, quarter_of

SHARDS = 4
AT_ONCE = 100
FIGURES = (
    "events",
    "calls",
    "cost_micro",
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "unpriced_calls",
    "unpriced_tokens",
    "tasks",
    "completed",
    "wasted_micro",
)

# By UTC day: who used it (key) and, in MODEL and TASK, with which model or agent (part).
AGENT, MODEL, USER, TASK = "agent", "model", "user", "task"
BY_DAY = (AGENT, MODEL, USER, TASK)
# Of all time: by provider, by task (and agent), and the number of events that only one person sees.
TOTAL, TASK_TOTAL, PRIVATE = "total", "task_total", "private"
ALL_TIME = 0
_QUARTER = "quarter:"
_CROWDED = frozenset({AGENT, MODEL, TOTAL})
"""Series whose rows many units add to at once; so are those by the quarter."""


class Place(NamedTuple):
    """A row of `cost_sums`, but for its shard."""

    series: str
    period: int
    key: str
    part: str = ""


def by_quarter(agent_id: str = "", provider: str = "") -> str:
    """The series of quarters of an hour, of all or of an agent or provider."""
    return f"{_QUARTER}{agent_id}:{provider}"


Row = Mapping[str, Any]
Figures = Mapping[str, int]


def figures_of(event: Row) -> dict[str, int]:
    """What an event (columns of `cost_events`) adds to a sum."""
    names = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
    tokens = {name: int(event[name]) for name in names}
    cost = event["cost_micro"]
    if cost is None:
        return {"events": 1, "calls": 1, "unpriced_calls": 1, "unpriced_tokens": sum(tokens.values()), **tokens}
    return {"events": 1, "calls": 0 if cost < 0 else 1, "cost_micro": cost, **tokens}


def places_of(event: Row) -> list[Place]:
    """The rows that an event adds to."""
    day, quarter = day_of(event["ts"]), quarter_of(event["ts"])
    agent, task, provider = event["agent_id"] or "", event["task_id"], event["provider"]
    quarters = {by_quarter(*of) for of in itertools.product({"", agent}, ("", provider))}
    places = [
        *(Place(series, quarter, "") for series in quarters),
        Place(AGENT, day, agent),
        Place(MODEL, day, provider, event["model"]),
        Place(USER, day, event["user_id"] or ""),
        Place(TOTAL, ALL_TIME, provider),
    ]
    if task is not None:
        places += [Place(TASK, day, task, agent), Place(TASK_TOTAL, ALL_TIME, task, agent)]
    if event["private_to"] is not None:
        places.append(Place(PRIVATE, ALL_TIME, event["private_to"]))
    return places


_NEW_TASK = Statement(
    lambda p: (
        Sum.insert(series=TASK_TOTAL, period=ALL_TIME, key=p("task"), part=p("agent"), shard=0)
        .on_conflict_ignore()
        .returning(Sum.key)
    )
)


def add_event(event: Row) -> None:
    """Add an event that has just been written to all its sums when the unit ends."""
    add(places_of(event), figures_of(event))
    agent, task = event["agent_id"] or "", event["task_id"]
    if task is not None and _NEW_TASK.one({"task": task, "agent": agent}) is not None:
        add([Place(AGENT, day_of(event["ts"]), agent)], {"tasks": 1})


class Increment:
    """What a part of a unit adds. The last one of a unit writes for all; undoing a part takes its increment away."""

    def __init__(self, places: Iterable[Place], figures: Figures) -> None:
        self.places, self.figures = tuple(places), figures

    def __call__(self) -> None:
        """Write, when the unit's rows are written."""
        increments = [call for call in current().before if isinstance(call, Increment)]
        if increments[-1] is self:
            merged: dict[Place, Counter[str]] = {}
            for increment in increments:
                for place in increment.places:
                    merged.setdefault(place, Counter()).update(increment.figures)
            write(merged)


def add(places: Iterable[Place], figures: Figures) -> None:
    """Add to sums when the unit ends."""
    before_commit(Increment(places, figures))


def write(merged: Mapping[Place, Figures]) -> None:
    """Add to sums now."""
    own = counter_shard(SHARDS)
    rows = sorted((place, own if _is_crowded(place.series) else 0) for place in merged)
    for start in range(0, len(rows), AT_ONCE):
        values: dict[str, Any] = {}
        batch = rows[start : start + AT_ONCE]
        for n, (place, shard) in enumerate(batch):
            values |= {f"{name}{n}": value for name, value in zip(_KEY, (*place, shard), strict=True)}
            values |= {f"{name}{n}": merged[place].get(name, 0) for name in FIGURES}
        _upsert(len(batch)).run(values)


_KEY = ("series", "period", "key", "part", "shard")


def _is_crowded(series: str) -> bool:
    return series in _CROWDED or series.startswith(_QUARTER)


@functools.lru_cache(maxsize=AT_ONCE)
def _upsert(size: int) -> Statement:
    def build(p: Parameter) -> peewee.Query:
        rows = [{getattr(Sum, name): p(f"{name}{n}") for name in (*_KEY, *FIGURES)} for n in range(size)]
        more = {getattr(Sum, name): getattr(Sum, name) + getattr(peewee.EXCLUDED, name) for name in FIGURES}
        return Sum.insert_many(rows).on_conflict(conflict_target=[getattr(Sum, name) for name in _KEY], update=more)

    return Statement(build)


# -- reading


class Came(NamedTuple):
    """The figures of one group, in the order of `FIGURES`."""

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

    def plus(self, other: Came) -> Came:
        """Both together."""
        return Came(*map(operator.add, self, other))


NOTHING = Came()
SUMMED = [peewee.fn.SUM(getattr(Sum, name)) for name in FIGURES]

_DAYS = Statement(
    lambda p: (
        Sum.select((Sum.period + p("offset")) / QUARTERS_A_DAY, *SUMMED)
        .where((Sum.series == p("series")) & (Sum.period >= p("first")) & (Sum.period < p("end")))
        .group_by(peewee.SQL("1"))
        .tuples()
    )
)
_UTC_DAYS = Statement(
    lambda p: (
        Sum.select(Sum.period, *SUMMED)
        .where((Sum.series == p("series")) & (Sum.period >= p("first")) & (Sum.period < p("end")))
        .group_by(Sum.period)
        .tuples()
    )
)
_UTC_DAYS_OF_KEY = Statement(
    lambda p: (
        Sum.select(Sum.period, *SUMMED)
        .where((Sum.series == p("series")) & (Sum.period >= p("first")) & (Sum.period < p("end")))
        .where(Sum.key == p("key"))
        .group_by(Sum.period)
        .tuples()
    )
)
_AT_KEY = Statement(
    lambda p: (
        Sum.select(*SUMMED)
        .where((Sum.series == p("series")) & (Sum.period == p("period")) & (Sum.key == p("key")))
        .tuples()
    )
)
_GROUPS = Statement(
    lambda p: (
        Sum.select(Sum.key, Sum.part, *SUMMED)
        .where((Sum.series == p("series")) & (Sum.period >= p("first")) & (Sum.period <= p("last")))
        .group_by(Sum.key, Sum.part)
        .tuples()
    )
)


def came(values: Iterable[Any]) -> Came:
    """A row of `SUMMED`; engines give null for no rows, and PostgreSQL decimals."""
    return Came(*(int(value or 0) for value in values))


def by_local_day(pieces: Iterable[Stretch], *, agent_id: str = "", provider: str = "") -> dict[int, Came]:
    """What all, or an agent, or a provider cost by day (days since 1970) in the zone of the pieces.

    Days without rows are left out.
    """
    found: dict[int, Came] = {}
    for piece in pieces:
        for day, *values in _days(piece, agent_id, provider):
            found[int(day)] = found.get(int(day), NOTHING).plus(came(values))
    return found


def _days(piece: Stretch, agent_id: str, provider: str) -> list[tuple[Any, ...]]:
    """Days of UTC are sums already; those of other zones are made of quarters."""
    first, rest = divmod(piece.first, QUARTERS_A_DAY)
    end, more = divmod(piece.end, QUARTERS_A_DAY)
    if piece.offset or rest or more or (agent_id and provider):
        bounds = {"first": piece.first, "end": piece.end, "offset": piece.offset}
        return _DAYS.rows({**bounds, "series": by_quarter(agent_id, provider)})
    days = {"first": first, "end": end, "series": AGENT if agent_id else MODEL}
    key = agent_id or provider
    return _UTC_DAYS_OF_KEY.rows({**days, "key": key}) if key else _UTC_DAYS.rows(days)


def at_key(series: str, key: str) -> Came:
    """One key of a series of all time."""
    return came(_AT_KEY.one({"series": series, "period": ALL_TIME, "key": key}) or ())


def groups(series: str, first: int, last: int) -> list[tuple[str, str, Came]]:
    """`(key, part, figures)` of a series over periods, both ends included."""
    rows = _GROUPS.rows({"series": series, "first": first, "last": last})
    return [(key, part, came(values)) for key, part, *values in rows]
