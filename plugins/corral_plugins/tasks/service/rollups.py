"""Rollups: counters and hourly sums that change with the rows they count, statistics of attempts, and metrics."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from corral import clock
from corral.database.statement import Statement
from corral.database.unit import after_commit, before_commit, current
from corral.metrics.histogram import LONG_SECONDS, Histogram
from corral_plugins.agents.api import WorkFigures
from corral_plugins.tasks.models import (
    PRIORITIES,
    STATUSES,
    TERMINAL,
    HourlyRollup,
    OpenTaskCounter,
    StatusCounter,
    Task,
)
from corral_plugins.tasks.service import rows

SHARDS = 16
HOURS = 24

_COUNT = Statement(
    lambda p: StatusCounter.insert(
        {
            StatusCounter.status: p("status"),
            StatusCounter.priority: p("priority"),
            StatusCounter.shard: p("shard"),
            StatusCounter.n: p("n"),
        }
    ).on_conflict(
        conflict_target=[StatusCounter.status, StatusCounter.priority, StatusCounter.shard],
        update={StatusCounter.n: StatusCounter.n + p("n")},
    )
)
_OPEN = Statement(
    lambda p: OpenTaskCounter.insert(
        {OpenTaskCounter.created_by: p("user"), OpenTaskCounter.shard: p("shard"), OpenTaskCounter.n: p("n")}
    ).on_conflict(
        conflict_target=[OpenTaskCounter.created_by, OpenTaskCounter.shard],
        update={OpenTaskCounter.n: OpenTaskCounter.n + p("n")},
    )
)
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
_MATRIX = Statement(
    lambda p: StatusCounter.select(StatusCounter.status, StatusCounter.priority, StatusCounter.n).tuples()
)
_OPEN_OF = Statement(
    lambda p: OpenTaskCounter.select(OpenTaskCounter.n).where(OpenTaskCounter.created_by == p("user")).tuples()
)
_HOURS = Statement(
    lambda p: (
        HourlyRollup.select(*[getattr(HourlyRollup, name) for name in HOUR_FIELDS])
        .where(HourlyRollup.hour >= p("since"))
        .tuples()
    )
)

_OLDEST = Statement(
    lambda p: Task.select(Task.queued_at).where(rows.PENDING).order_by(Task.queued_at).limit(1).tuples()
)
_next_shard = itertools.count(os.getpid())


class _Lane(threading.local):
    def __init__(self) -> None:
        self.shard = next(_next_shard) % SHARDS


_lane = _Lane()


class CounterDeltas:
    """What the current unit adds to the counters."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.open: Counter[str] = Counter()
        self.hour: Counter[str] = Counter()

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


def _deltas() -> CounterDeltas:
    unit = current()
    for call in unit.before:
        if isinstance(call, CounterDeltas):
            return call
    deltas = CounterDeltas()
    before_commit(deltas)
    return deltas


def count_transition(previous: str | None, status: str | None, priority: int, created_by: str | None) -> None:
    """A task went from one status to another (None: it did not exist, or does not any more)."""
    deltas = _deltas()
    if previous is not None:
        deltas.counts[(previous, priority)] -= 1
    if status is not None:
        deltas.counts[(status, priority)] += 1
    if created_by is not None:
        was, is_open = previous is not None and previous not in TERMINAL, status is not None and status not in TERMINAL
        if was != is_open:
            deltas.open[created_by] += 1 if is_open else -1


def count_priority_change(status: str, before: int, after: int) -> None:
    """An owner gave a task another priority."""
    deltas = _deltas()
    deltas.counts[(status, before)] -= 1
    deltas.counts[(status, after)] += 1


def count_end(*, completed: bool, duration_ms: int | None) -> None:
    """A task was completed, or failed for good."""
    hour = _deltas().hour
    hour["completed" if completed else "failed"] += 1
    if completed and duration_ms is not None:
        hour["duration_ms"] += duration_ms


def count_start(queue_ms: int) -> None:
    """An attempt started after so long in the queue."""
    hour = _deltas().hour
    hour["queued"] += 1
    hour["queue_ms"] += queue_ms


def status_counts() -> Counter[tuple[str, int]]:
    """Tasks by status and priority, as committed."""
    sums: Counter[tuple[str, int]] = Counter()
    for status, priority, n in _MATRIX.rows({}):
        sums[(status, priority)] += n
    return sums


def open_tasks(user_id: str) -> int:
    """Unfinished tasks of a person."""
    return sum(n for (n,) in _OPEN_OF.rows({"user": user_id}))


def day_began() -> str:
    """The hour with which the last 24 hours begin, as the beginning of an instant."""
    return clock.now(-HOURS * 3600)[:13]


def last_day() -> Counter[str]:
    """What ended in the last 24 hours (whole hours): `completed, failed, duration_ms, queued, queue_ms`."""
    sums: Counter[str] = Counter()
    for row in _HOURS.rows({"since": day_began()}):
        for name, n in zip(HOUR_FIELDS, row, strict=True):
            sums[name] += n
    return sums


def oldest_pending_ms() -> int | None:
    """How long the oldest pending task has been waiting for a worker."""
    found = _OLDEST.one({})
    return None if found is None or found[0] is None else clock.elapsed_ms(found[0], clock.now())


def snapshot() -> CounterDeltas:
    """A copy of what the unit has counted so far."""
    deltas, copy = _deltas(), CounterDeltas()
    copy.counts, copy.open, copy.hour = deltas.counts.copy(), deltas.open.copy(), deltas.hour.copy()
    return copy


def restore(copy: CounterDeltas) -> None:
    """Count as it was at a snapshot."""
    deltas = _deltas()
    deltas.counts, deltas.open, deltas.hour = copy.counts, copy.open, copy.hour


_SQLITE_MS = "CAST(ROUND((julianday({until}) - julianday({since})) * 86400000) AS INTEGER)"
_POSTGRES_MS = (
    "CAST(ROUND(EXTRACT(EPOCH FROM (CAST({until} AS timestamptz) - CAST({since} AS timestamptz))) * 1000) AS BIGINT)"
)
NEWEST = 10_000
"""Only so many attempts are looked at: an agent may have a million, and a unit has two seconds."""
# `ms` is of an attempt that ran to a result or a failure; null for every other.
_FIGURES = """
WITH newest AS (
  SELECT agent_id, agent_version, status, cost_micro, input_tokens, output_tokens, stalls, started_at, finished_at
  FROM tasks_attempts WHERE agent_id = {mark} AND created_at >= {mark} ORDER BY created_at DESC LIMIT {newest}
), ended AS (
  SELECT newest.*, CASE WHEN status IN ('completed', 'failed') THEN {ms} END AS ms FROM newest
), placed AS (
  SELECT ended.*, CUME_DIST() OVER (PARTITION BY {group}, ms IS NULL ORDER BY ms) AS place FROM ended
)
SELECT {group}, COUNT(*), SUM(CASE WHEN status = 'completed' THEN 1 ELSE 0 END),
  SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END), AVG(ms), MIN(CASE WHEN place >= 0.95 THEN ms END),
  SUM(cost_micro), SUM(input_tokens), SUM(output_tokens), SUM(stalls)
FROM placed GROUP BY {group}
"""


class Record:
    """Implements `AgentRecord`: one query each, over the newest attempts of one agent.

    An attempt is a claim. The rate and the durations are of attempts that were completed or failed; those that were
    cancelled, given back or made to wait say nothing about the agent.
    """

    def figures(self, agent_id: str, *, since: str) -> WorkFigures:
        found = _run("agent_id", agent_id, since)
        return _figures(found[0]) if found else _figures((0,) * 10)

    def figures_of_versions(self, agent_id: str, versions: Sequence[int]) -> dict[int, WorkFigures]:
        found = {int(row[0]): _figures(row) for row in _run("agent_version", agent_id, "")}
        is_whole = sum(figures.attempts or 0 for figures in found.values()) < NEWEST
        absent = _figures((0,) * 10) if is_whole else WorkFigures()
        return {version: found.get(version, absent) for version in versions}


def milliseconds(since: str, until: str) -> str:
    """SQL of the time between two columns; null when one is."""
    return (_SQLITE_MS if current().database.kind == "sqlite" else _POSTGRES_MS).format(since=since, until=until)


def _run(group: str, agent_id: str, since: str) -> list[tuple[Any, ...]]:
    unit = current()
    mark = "?" if unit.database.kind == "sqlite" else "%s"
    sql = _FIGURES.format(ms=milliseconds("started_at", "finished_at"), mark=mark, newest=NEWEST, group=group)
    found: list[tuple[Any, ...]] = unit.connection.execute(sql, [agent_id, since]).fetchall()
    return found


def _figures(row: Sequence[Any]) -> WorkFigures:
    _, attempts, completed, failed, average, p95, cost, tokens_in, tokens_out, stalls = row
    ended = completed + failed
    return WorkFigures(
        attempts=attempts,
        completed=completed,
        failed=failed,
        success_rate=completed / ended if ended else None,
        avg_duration_ms=round(average) if ended and average is not None else None,
        p95_duration_ms=int(p95) if ended and p95 is not None else None,
        cost_usd=float(cost) / 1e6,
        input_tokens=int(tokens_in),
        output_tokens=int(tokens_out),
        stalls=int(stalls),
    )


class TaskMetrics:
    """Attempts that ended, leases that were taken back, runs that stalled, and how long things took. Counted once their
    unit is committed.
    """

    def __init__(self) -> None:
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._reclaims = 0
        self._stalls: Counter[tuple[str, ...]] = Counter()
        self.durations, self.queueing = Histogram(LONG_SECONDS), Histogram(LONG_SECONDS)
        self.cancelling = Histogram(LONG_SECONDS)

    def attempt_ended(self, result: str, *, by: str) -> None:
        """A lease ended with this line in the ledger."""
        after_commit(lambda: self._count(result, by))

    def started(self, queue_ms: int) -> None:
        """An attempt started after so long in the queue."""
        after_commit(lambda: self.queueing.observe(queue_ms / 1000))

    def completed(self, duration_ms: int | None) -> None:
        """A task was completed; null: it never started."""
        if duration_ms is not None:
            after_commit(lambda: self.durations.observe(duration_ms / 1000))

    def cancelled(self, cancel_ms: int) -> None:
        """A run ended so long after it was asked to."""
        after_commit(lambda: self.cancelling.observe(cancel_ms / 1000))

    def stalled(self, kind: str) -> None:
        """A run was found idle or in a loop."""
        after_commit(lambda: self._stalls.update([(kind,)]))

    def _count(self, result: str, by: str) -> None:
        self._attempts[(result,)] += 1
        self._reclaims += by == "reaper"

    def attempts(self) -> Mapping[tuple[str, ...], float]:
        """By result."""
        return self._attempts

    def reclaims(self) -> Mapping[tuple[str, ...], float]:
        """Runs that ended without their worker."""
        return {(): self._reclaims}

    def stalls(self) -> Mapping[tuple[str, ...], float]:
        """By kind."""
        return self._stalls


RESULTS = ("completed", "failed", "cancelled", "released", "lost", "waiting")
STALLS = ("idle", "loop")

Values = Mapping[tuple[str, ...], float]


def tasks_by_status() -> Values:
    """Tasks by status."""
    counts = status_counts()
    return {(status,): sum(counts[(status, rank)] for rank in range(len(PRIORITIES))) for status in STATUSES}


def queue_depth() -> Values:
    """Pending tasks."""
    return {(): tasks_by_status()[("pending",)]}


def oldest_seconds() -> Values:
    """The wait of the oldest pending task."""
    return {(): (oldest_pending_ms() or 0) / 1000}
