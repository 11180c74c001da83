"""Counters and hourly sums that change together with the rows they count, so that no read has to count tasks.

They are sharded, so that concurrent units of work rarely wait for each other. They are written at the end of a unit in
a fixed order, so that their locks are short and never form a cycle.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict

import peewee

from corral import clock
from corral.database.dialect import counter_shard
from corral.database.statement import Parameter, Statement
from corral.database.unit import before_commit, current
from corral_plugins.tasks.models import PRIORITIES, TERMINAL, HourlyRollup, Task, TaskCounter
from corral_plugins.tasks.service import rows

SHARDS = 16
HOURS = 24


@functools.cache
def _add(size: int) -> Statement:
    """Return the statement that adds to `size` counters at once."""

    def build(p: Parameter) -> peewee.Query:
        values = [
            {TaskCounter.name: p(f"name{i}"), TaskCounter.shard: p("shard"), TaskCounter.n: p(f"n{i}")}
            for i in range(size)
        ]
        return TaskCounter.insert_many(values).on_conflict(
            conflict_target=[TaskCounter.name, TaskCounter.shard],
            update={TaskCounter.n: TaskCounter.n + peewee.EXCLUDED.n},
        )

    return Statement(build)


HOUR_FIELDS = ("completed", "failed", "duration_ms", "queued", "queue_ms")
_HOUR = Statement(
    lambda p: HourlyRollup.insert(
        {
            HourlyRollup.hour: p("hour"),
            HourlyRollup.shard: p("shard"),
            **{getattr(HourlyRollup, name): p(name) for name in HOUR_FIELDS},
        }
    ).on_conflict(
        conflict_target=[HourlyRollup.hour, HourlyRollup.shard],
        update={getattr(HourlyRollup, name): getattr(HourlyRollup, name) + p(name) for name in HOUR_FIELDS},
    )
)
_STATUS_COUNTS = Statement(
    lambda p: (
        TaskCounter.select(TaskCounter.name, TaskCounter.n)
        .where((TaskCounter.name > "status:") & (TaskCounter.name < "status;"))
        .tuples()
    )
)
_COUNTER = Statement(lambda p: TaskCounter.select(TaskCounter.n).where(TaskCounter.name == p("name")).tuples())
_HOURS = Statement(
    lambda p: (
        HourlyRollup.select(*[getattr(HourlyRollup, name) for name in HOUR_FIELDS])
        .where(HourlyRollup.hour >= p("since"))
        .tuples()
    )
)
_OLDEST = Statement(
    lambda p: (
        Task.select(Task.queued_at)
        .where(rows.QUEUED & (Task.rank == p("rank")) & (Task.priority == p("priority")))
        .order_by(Task.queued_at)
        .limit(1)
        .tuples()
    )
)


class CounterDeltas:
    """The changes of the current unit of work to the counters and to the rollup of the current hour."""

    def __init__(self) -> None:
        self.counters: defaultdict[str, int] = defaultdict(int)
        self.hour: defaultdict[str, int] = defaultdict(int)

    def __call__(self) -> None:
        """Write the changes to the database. Called before the commit, after the other rows are written."""
        shard = counter_shard(SHARDS)
        counters = [(name, n) for name, n in sorted(self.counters.items()) if n]
        if counters:
            values: dict[str, str | int] = {"shard": shard}
            for i, (name, n) in enumerate(counters):
                values[f"name{i}"], values[f"n{i}"] = name, n
            _add(len(counters)).run(values)
        if self.hour:
            _HOUR.run({"hour": clock.now()[:13], "shard": shard, **{name: self.hour[name] for name in HOUR_FIELDS}})


def _deltas() -> CounterDeltas:
    unit = current()
    for call in unit.before:
        if isinstance(call, CounterDeltas):
            return call
    deltas = CounterDeltas()
    before_commit(deltas)
    return deltas


# -- writing


def count_transition(previous: str | None, status: str | None, priority: int, created_by: str | None) -> None:
    """Count a transition. `previous` is null for a new task, and `status` is null for a deleted task."""
    counters = _deltas().counters
    if previous is not None:
        counters[f"status:{previous}:{priority}"] -= 1
    if status is not None:
        counters[f"status:{status}:{priority}"] += 1
    if created_by is not None:
        was, is_open = previous is not None and previous not in TERMINAL, status is not None and status not in TERMINAL
        if was != is_open:
            counters[f"open:{created_by}"] += 1 if is_open else -1


def count_priority_change(status: str, before: int, after: int) -> None:
    """Count a change of the priority by the owner."""
    counters = _deltas().counters
    counters[f"status:{status}:{before}"] -= 1
    counters[f"status:{status}:{after}"] += 1


def count_end(*, completed: bool, duration_ms: int | None) -> None:
    """Count a task that was completed or failed permanently."""
    hour = _deltas().hour
    hour["completed" if completed else "failed"] += 1
    if completed and duration_ms is not None:
        hour["duration_ms"] += duration_ms


def count_start(queue_ms: int) -> None:
    """Count the start of an attempt, with the milliseconds that it waited in the queue."""
    hour = _deltas().hour
    hour["queued"] += 1
    hour["queue_ms"] += queue_ms


def snapshot() -> CounterDeltas:
    """Return a copy of the changes that the unit of work has counted so far."""
    deltas, copy = _deltas(), CounterDeltas()
    copy.counters, copy.hour = deltas.counters.copy(), deltas.hour.copy()
    return copy


def restore(copy: CounterDeltas) -> None:
    """Reset the counted changes to a snapshot."""
    deltas = _deltas()
    deltas.counters, deltas.hour = copy.counters, copy.hour


# -- reading


def status_counts() -> Counter[tuple[str, int]]:
    """Return the committed number of tasks by status and priority."""
    counts: Counter[tuple[str, int]] = Counter()
    for name, n in _STATUS_COUNTS.rows({}):
        _, status, priority = name.split(":")
        counts[(status, int(priority))] += n
    return counts


def pending_tasks() -> int:
    """Return the number of pending tasks."""
    return sum(n for (status, _), n in status_counts().items() if status == "pending")


def open_tasks(user_id: str) -> int:
    """Return the number of unfinished tasks of a person."""
    return sum(n for (n,) in _COUNTER.rows({"name": f"open:{user_id}"}))


def day_began() -> str:
    """Return the hour in which the last 24 hours began, as a prefix of an instant."""
    return clock.now(-HOURS * 3600)[:13]


def last_day() -> Counter[str]:
    """Return the sums of `HOUR_FIELDS` over the last 24 hours, in whole hours."""
    sums: Counter[str] = Counter()
    for row in _HOURS.rows({"since": day_began()}):
        for name, n in zip(HOUR_FIELDS, row, strict=True):
            sums[name] += n
    return sums


def oldest_pending_ms() -> int | None:
    """Return how long the oldest pending task has been waiting for a worker, or null if no task is pending."""
    pairs = ((rank, priority) for priority in range(len(PRIORITIES)) for rank in range(priority, len(PRIORITIES) + 1))
    found = [_OLDEST.one({"rank": rank, "priority": priority}) for rank, priority in pairs]
    oldest = min((row[0] for row in found if row is not None), default=None)
    if oldest is not None:
        return clock.elapsed_ms(oldest, clock.now())
    return 0 if pending_tasks() else None
