"""The end of what is kept long enough; sums stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import peewee

from corral import clock
from corral_plugins.cost.models import CostEvent, Sum
from corral_plugins.cost.service import sums
from corral_plugins.cost.service.days import FIRST_QUARTER, QUARTERS_A_DAY, day_of
from corral_plugins.cost.service.sums import ALL_TIME, PRIVATE, TASK, TOTAL, Place

AT_ONCE = 500
FINE_DAYS = 400
"""How long sums by the quarter and by task and day are kept: no answer looks further back than a year."""


def prune_events(before: str) -> int:
    """Delete events older than an instant, at most `AT_ONCE`; how many. Lists count without them from now on."""
    columns = (CostEvent.id, CostEvent.provider, CostEvent.private_to)
    old: Any = CostEvent.select(*columns).where(CostEvent.ts < before).order_by(CostEvent.ts).limit(AT_ONCE).tuples()
    rows = list(old)
    if rows:
        CostEvent.delete().where(CostEvent.id.in_([row[0] for row in rows])).execute()
        gone = Counter(Place(TOTAL, ALL_TIME, provider) for _, provider, _ in rows)
        gone.update(Place(PRIVATE, ALL_TIME, person) for _, _, person in rows if person is not None)
        sums.write({place: {"events": -n} for place, n in gone.items()})
    return len(rows)


def prune_quarters() -> int:
    """Delete sums by the quarter of an hour that no answer reads any more, at most `AT_ONCE`; how many."""
    return _delete((Sum.period >= FIRST_QUARTER) & (Sum.period < _first_fine_day() * QUARTERS_A_DAY))


def prune_task_days() -> int:
    """The same for sums by task and day; what a task cost in all stays."""
    return _delete((Sum.series == TASK) & (Sum.period < _first_fine_day()))


def _first_fine_day() -> int:
    return day_of(clock.now()) - FINE_DAYS


def _delete(old: Any) -> int:
    key = (Sum.series, Sum.period, Sum.key, Sum.part, Sum.shard)
    found: Any = Sum.select(*key).where(old).limit(AT_ONCE).tuples()
    rows = list(found)
    return int(Sum.delete().where(peewee.Tuple(*key).in_(rows)).execute()) if rows else 0
