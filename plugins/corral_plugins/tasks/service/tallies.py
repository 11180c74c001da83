"""Counters that change with the rows they count, in one unit. Sharded, so that units do not wait for each other.

They are written at the end of the unit, in one order, so that their locks are short and never form a circle.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter as Numbers

from corral import clock
from corral.database.statement import Statement
from corral.database.unit import before_commit, current
from corral_plugins.tasks.models import TERMINAL
from corral_plugins.tasks.sums import Counter, Hour, OpenCounter

SHARDS = 16
HOURS = 24

_COUNT = Statement(
    lambda p: Counter.insert(
        {Counter.status: p("status"), Counter.priority: p("priority"), Counter.shard: p("shard"), Counter.n: p("n")}
    ).on_conflict(
        conflict_target=[Counter.status, Counter.priority, Counter.shard], update={Counter.n: Counter.n + p("n")}
    )
)
_OPEN = Statement(
    lambda p: OpenCounter.insert(
        {OpenCounter.created_by: p("user"), OpenCounter.shard: p("shard"), OpenCounter.n: p("n")}
    ).on_conflict(
        conflict_target=[OpenCounter.created_by, OpenCounter.shard], update={OpenCounter.n: OpenCounter.n + p("n")}
    )
)
HOUR_FIELDS = ("completed", "failed", "duration_ms", "queued", "queue_ms")
_HOUR = Statement(
    lambda p: Hour.insert(
        {Hour.hour: p("hour"), Hour.shard: p("shard"), **{getattr(Hour, name): p(name) for name in HOUR_FIELDS}}
    ).on_conflict(
        conflict_target=[Hour.hour, Hour.shard],
        update={getattr(Hour, name): getattr(Hour, name) + p(name) for name in HOUR_FIELDS},
    )
)
_MATRIX = Statement(lambda p: Counter.select(Counter.status, Counter.priority, Counter.n).tuples())
_OPEN_OF = Statement(lambda p: OpenCounter.select(OpenCounter.n).where(OpenCounter.created_by == p("user")).tuples())
_HOURS = Statement(
    lambda p: Hour.select(*[getattr(Hour, name) for name in HOUR_FIELDS]).where(Hour.hour >= p("since")).tuples()
)

_next_shard = itertools.count(os.getpid())


class _Lane(threading.local):
    def __init__(self) -> None:
        self.shard = next(_next_shard) % SHARDS


_lane = _Lane()


class Tally:
    """What the current unit adds to the counters."""

    def __init__(self) -> None:
        self.counts: Numbers[tuple[str, int]] = Numbers()
        self.open: Numbers[str] = Numbers()
        self.hour: Numbers[str] = Numbers()

    def __call__(self) -> None:
        """Write; called when the unit's rows are written."""
        shard = 0 if current().database.kind == "sqlite" else _lane.shard
        for (status, priority), n in sorted(self.counts.items()):
            if n:
                _COUNT.run({"status": status, "priority": priority, "shard": shard, "n": n})
        for user, n in sorted(self.open.items()):
            if n:
                _OPEN.run({"user": user, "shard": shard, "n": n})
        if self.hour:
            _HOUR.run({"hour": clock.now()[:13], "shard": shard, **{name: self.hour[name] for name in HOUR_FIELDS}})


def _tally() -> Tally:
    unit = current()
    for call in unit.before:
        if isinstance(call, Tally):
            return call
    tally = Tally()
    before_commit(tally)
    return tally


def moved(previous: str | None, status: str | None, priority: int, created_by: str | None) -> None:
    """A task went from one status to another (None: it did not exist, or does not any more)."""
    tally = _tally()
    if previous is not None:
        tally.counts[(previous, priority)] -= 1
    if status is not None:
        tally.counts[(status, priority)] += 1
    if created_by is not None:
        was, is_open = previous is not None and previous not in TERMINAL, status is not None and status not in TERMINAL
        if was != is_open:
            tally.open[created_by] += 1 if is_open else -1


def reprioritised(status: str, before: int, after: int) -> None:
    """An owner gave a task another priority."""
    tally = _tally()
    tally.counts[(status, before)] -= 1
    tally.counts[(status, after)] += 1


def ended(*, completed: bool, duration_ms: int | None) -> None:
    """A task was completed, or failed for good."""
    hour = _tally().hour
    hour["completed" if completed else "failed"] += 1
    if completed and duration_ms is not None:
        hour["duration_ms"] += duration_ms


def started(queue_ms: int) -> None:
    """An attempt started after so long in the queue."""
    hour = _tally().hour
    hour["queued"] += 1
    hour["queue_ms"] += queue_ms


def matrix() -> Numbers[tuple[str, int]]:
    """Tasks by status and priority, as committed."""
    sums: Numbers[tuple[str, int]] = Numbers()
    for status, priority, n in _MATRIX.rows({}):
        sums[(status, priority)] += n
    return sums


def open_of(user_id: str) -> int:
    """Unfinished tasks of a person."""
    return sum(n for (n,) in _OPEN_OF.rows({"user": user_id}))


def day_began() -> str:
    """The hour with which the last 24 hours begin, as the beginning of an instant."""
    return clock.now(-HOURS * 3600)[:13]


def last_day() -> Numbers[str]:
    """What ended in the last 24 hours (whole hours): `completed, failed, duration_ms, queued, queue_ms`."""
    sums: Numbers[str] = Numbers()
    for row in _HOURS.rows({"since": day_began()}):
        for name, n in zip(HOUR_FIELDS, row, strict=True):
            sums[name] += n
    return sums


def snapshot() -> Tally:
    """A copy of what the unit has counted so far."""
    tally, copy = _tally(), Tally()
    copy.counts, copy.open, copy.hour = tally.counts.copy(), tally.open.copy(), tally.hour.copy()
    return copy


def restore(copy: Tally) -> None:
    """Count as it was at a snapshot."""
    tally = _tally()
    tally.counts, tally.open, tally.hour = copy.counts, copy.open, copy.hour
