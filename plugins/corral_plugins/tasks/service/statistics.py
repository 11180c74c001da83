"""Statistics about tasks and agents: counters and hourly statistics in the database, and the metrics of this process.

The counters and hourly statistics are updated in the same transaction as the tasks that they count, so that no tasks
have to be counted when the statistics are read. They are sharded, so that concurrent transactions rarely wait for each
other. A transaction writes its changes to the counters and statistics at its end and in a fixed order, so that it holds
the locks only briefly and causes no deadlock.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import peewee

from corral import clock
from corral.database.dialect import counter_shard, execute, milliseconds_between
from corral.database.statement import Statement
from corral.database.unit import after_commit, collect
from corral.metrics.histogram import LONG_SECONDS, Histogram
from corral.plugin import Metric
from corral_plugins.agents.api import AttemptStatistics
from corral_plugins.tasks.models import PRIORITIES, STATUSES, TERMINAL, HourlyRollup, Task, TaskCounter
from corral_plugins.tasks.service import rows

SHARDS = 16
HOURS = 24


_ADD_TO_COUNTER = Statement(
    lambda p: TaskCounter.insert(
        {TaskCounter.name: p("name"), TaskCounter.shard: p("shard"), TaskCounter.n: p("n")}
    ).on_conflict(
        conflict_target=[TaskCounter.name, TaskCounter.shard],
        update={TaskCounter.n: TaskCounter.n + peewee.EXCLUDED.n},
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
_COUNTS_STATUS = (TaskCounter.name > "status:") & (TaskCounter.name < "status;")
_STATUS_COUNTS = Statement(lambda p: TaskCounter.select(TaskCounter.name, TaskCounter.n).where(_COUNTS_STATUS).tuples())
_ALL_TASKS = Statement(lambda p: TaskCounter.select(peewee.fn.SUM(TaskCounter.n)).where(_COUNTS_STATUS).tuples())
_COUNTER = Statement(lambda p: TaskCounter.select(TaskCounter.n).where(TaskCounter.name == p("name")).tuples())
_HOURS = Statement(
    lambda p: (
        HourlyRollup.select(*[getattr(HourlyRollup, name) for name in HOUR_FIELDS])
        .where(HourlyRollup.hour >= p("since"))
        .tuples()
    )
)
RANKS = tuple((rank, priority) for priority in range(len(PRIORITIES)) for rank in range(priority, len(PRIORITIES) + 1))
"""The combinations of rank and priority that a pending task can have, as `(rank, priority)`."""
_OLDEST = Statement(
    lambda p: (
        Task.select(Task.queued_at, Task.id)
        .where(rows.QUEUED & (Task.rank == p("rank")) & (Task.priority == p("priority")))
        .order_by(Task.queued_at)
        .limit(1)
        .tuples()
    )
)


# -- writing


Changes = Sequence[tuple[str, int]]
"""Names of counters or of hourly statistics, each with the amount to add."""


def _sums(collected: Sequence[Changes]) -> dict[str, int]:
    """Return the sum for each name, in a fixed order."""
    sums: defaultdict[str, int] = defaultdict(int)
    for changes in collected:
        for name, n in changes:
            sums[name] += n
    return dict(sorted(sums.items()))


def _write_counters(collected: Sequence[Changes]) -> None:
    shard = counter_shard(SHARDS)
    _ADD_TO_COUNTER.run_many([{"name": name, "shard": shard, "n": n} for name, n in _sums(collected).items() if n])


def _write_hour(collected: Sequence[Changes]) -> None:
    """Add the given amounts to the statistics for the current hour."""
    shard = counter_shard(SHARDS)
    _HOUR.run({"hour": clock.now()[:13], "shard": shard, **dict.fromkeys(HOUR_FIELDS, 0), **_sums(collected)})


def count_transition(previous: str | None, status: str | None, priority: int, created_by: str | None) -> None:
    """Update the counters for a change of a task's status.

    `previous` is None for a new task, and `status` is None for a deleted task.
    """
    changes: list[tuple[str, int]] = []
    if previous is not None:
        changes.append((f"status:{previous}:{priority}", -1))
    if status is not None:
        changes.append((f"status:{status}:{priority}", 1))
    if created_by is not None:
        was, is_open = previous is not None and previous not in TERMINAL, status is not None and status not in TERMINAL
        if was != is_open:
            changes.append((f"open:{created_by}", 1 if is_open else -1))
    collect(_write_counters, changes)


def count_priority_change(status: str, before: int, after: int) -> None:
    """Update the counters after the owner of a task has changed the task's priority."""
    collect(_write_counters, [(f"status:{status}:{before}", -1), (f"status:{status}:{after}", 1)])


def count_ended_task(*, completed: bool, duration_ms: int | None) -> None:
    """Add a completed or permanently failed task to the statistics of the current hour."""
    took = duration_ms if completed and duration_ms is not None else 0
    collect(_write_hour, [("completed" if completed else "failed", 1), ("duration_ms", took)])


def count_started_attempt(queue_ms: int) -> None:
    """Count the start of an attempt, and add the time in milliseconds that the attempt waited in the queue."""
    collect(_write_hour, [("queued", 1), ("queue_ms", queue_ms)])


# -- reading


def status_counts() -> Counter[tuple[str, int]]:
    """Return the number of tasks, keyed by status and priority. Uncommitted changes are not counted."""
    counts: Counter[tuple[str, int]] = Counter()
    for name, n in _STATUS_COUNTS.rows({}):
        _, status, priority = name.split(":")
        counts[(status, int(priority))] += n
    return counts


def count_all_tasks() -> int:
    """Return the number of tasks. Uncommitted changes are not counted."""
    row = _ALL_TASKS.one({})
    return 0 if row is None else int(row[0] or 0)


def count_pending_tasks() -> int:
    """Return the number of pending tasks."""
    return sum(n for (status, _), n in status_counts().items() if status == "pending")


def count_open_tasks(user_id: str) -> int:
    """Return the number of a person's unfinished tasks."""
    return sum(n for (n,) in _COUNTER.rows({"name": f"open:{user_id}"}))


def start_of_last_day() -> str:
    """Return the hour that contains the time 24 hours ago, in the format `YYYY-MM-DDTHH`."""
    return clock.now(-HOURS * 3600)[:13]


def sums_of_last_day() -> Counter[str]:
    """Return the sums of `HOUR_FIELDS` over the current hour and the 24 hours before it."""
    sums: Counter[str] = Counter()
    for row in _HOURS.rows({"since": start_of_last_day()}):
        for name, n in zip(HOUR_FIELDS, row, strict=True):
            sums[name] += n
    return sums


def oldest_pending() -> tuple[str, str] | None:
    """Return the time at which the oldest pending task was queued, and its id. Return None if no task is queued."""
    found = [_OLDEST.one({"rank": rank, "priority": priority}) for rank, priority in RANKS]
    return min(((row[0], row[1]) for row in found if row is not None), default=None)


def oldest_pending_ms() -> int | None:
    """Return how long the oldest pending task has been waiting, in milliseconds, or None if no task is pending."""
    oldest = oldest_pending()
    if oldest is not None:
        return clock.elapsed_ms(oldest[0], clock.now())
    return 0 if count_pending_tasks() else None


# -- metrics


RESULTS = ("completed", "failed", "cancelled", "released", "lost", "waiting")
STALLS = ("idle", "loop")
LEASED_CALLS = (
    "start",
    "progress",
    "logs",
    "checkpoint",
    "secrets",
    "complete",
    "fail",
    "wait",
    "release",
    "cancelled",
)

Values = Mapping[tuple[str, ...], float]


class TaskMetrics:
    """Records metrics about ended attempts, expired leases, stalled runs and durations.

    Values are recorded when the unit of work commits. If it is rolled back, nothing is recorded.
    """

    def __init__(self) -> None:
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._reclaims = 0
        self._stalls: Counter[tuple[str, ...]] = Counter()
        self._stale_calls: Counter[tuple[str, ...]] = Counter()
        self.duration_histogram, self.queue_time_histogram = Histogram(LONG_SECONDS), Histogram(LONG_SECONDS)
        self.cancel_time_histogram = Histogram(LONG_SECONDS)

    def count_ended_attempt(self, result: str, *, by: str) -> None:
        """Count an ended attempt. `by` names the call or timer that ended the attempt."""
        after_commit(lambda: self._count_attempt(result, by))

    def observe_queue_time(self, queue_ms: int) -> None:
        """Record the time in milliseconds that an attempt waited in the queue before it started."""
        after_commit(lambda: self.queue_time_histogram.observe(queue_ms / 1000))

    def observe_duration(self, duration_ms: int | None) -> None:
        """Record the duration of a completed task in milliseconds.

        None means that the task never started, and is ignored.
        """
        if duration_ms is not None:
            after_commit(lambda: self.duration_histogram.observe(duration_ms / 1000))

    def observe_cancel_time(self, cancel_ms: int) -> None:
        """Record the time in milliseconds from a cancellation request to the end of the run."""
        after_commit(lambda: self.cancel_time_histogram.observe(cancel_ms / 1000))

    def count_stale_call(self, route: str) -> None:
        """Count a call under a lease that has ended.

        `route` is the route of the call, such as `POST /tasks/{id}/progress`.
        """
        call = [*route.split("/"), "", "", ""][3]
        self._stale_calls[(call if call in LEASED_CALLS else "other",)] += 1

    def count_stall(self, kind: str) -> None:
        """Count a stalled run. `kind` is `idle` or `loop`."""
        after_commit(lambda: self._stalls.update([(kind,)]))

    def definitions(self) -> list[Metric]:
        """Return the definitions of all task metrics."""
        return [*_gauges(), *self._counters(), *self._histograms()]

    def _counters(self) -> list[Metric]:
        return [
            Metric(
                name="corral_task_attempts_total",
                help="Number of finished attempts by result.",
                kind="counter",
                labels={"result": RESULTS},
                collect=self.attempts_by_result,
            ),
            Metric(
                name="corral_lease_reclaims_total",
                help="Number of leases that expired because their worker did not renew them.",
                kind="counter",
                collect=self.lease_reclaims,
            ),
            Metric(
                name="corral_stale_calls_total",
                help="Number of requests from workers whose lease had already ended, by type of request.",
                kind="counter",
                labels={"call": LEASED_CALLS},
                collect=self.stale_calls,
            ),
            Metric(
                name="corral_task_stalls_total",
                help="Number of stalled runs, by kind of stall.",
                kind="counter",
                labels={"kind": STALLS},
                collect=self.stalls_by_kind,
            ),
        ]

    def _histograms(self) -> list[Metric]:
        return [
            Metric(
                name="corral_task_duration_seconds",
                help="Time from the start of a task's last attempt to the result of the task, in seconds.",
                kind="histogram",
                collect=self.duration_histogram.read,
            ),
            Metric(
                name="corral_task_queue_seconds",
                help="Time that an attempt waited in the queue, in seconds.",
                kind="histogram",
                collect=self.queue_time_histogram.read,
            ),
            Metric(
                name="corral_task_cancel_seconds",
                help="Time from the request to cancel a run to the end of the run, in seconds.",
                kind="histogram",
                collect=self.cancel_time_histogram.read,
            ),
        ]

    def _count_attempt(self, result: str, by: str) -> None:
        self._attempts[(result,)] += 1
        self._reclaims += by == "reaper"

    def attempts_by_result(self) -> Values:
        """Return the number of ended attempts by result."""
        return self._attempts

    def lease_reclaims(self) -> Values:
        """Return the number of leases that expired because their worker did not renew them."""
        return {(): self._reclaims}

    def stale_calls(self) -> Values:
        """Return the number of calls that arrived after their lease had ended, by the name of the call."""
        return self._stale_calls

    def stalls_by_kind(self) -> Values:
        """Return the number of stalled runs by kind."""
        return self._stalls


def _gauges() -> list[Metric]:
    return [
        Metric(
            name="corral_tasks",
            help="Number of tasks by status.",
            labels={"status": STATUSES},
            collect=tasks_by_status,
        ),
        Metric(name="corral_queue_depth", help="Number of pending tasks.", collect=queue_depth),
        Metric(
            name="corral_queue_oldest_seconds",
            help="Waiting time of the oldest pending task, in seconds.",
            collect=oldest_pending_seconds,
        ),
    ]


def tasks_by_status() -> Values:
    """Return the number of tasks by status."""
    counts = status_counts()
    return {(status,): sum(counts[(status, rank)] for rank in range(len(PRIORITIES))) for status in STATUSES}


def queue_depth() -> Values:
    """Return the number of pending tasks."""
    return {(): count_pending_tasks()}


def oldest_pending_seconds() -> Values:
    """Return how many seconds the oldest pending task has been waiting."""
    return {(): (oldest_pending_ms() or 0) / 1000}


# -- statistics of agents


NEWEST = 10_000
"""The maximum number of attempts that one query reads.

The limit is necessary because an agent may have a million attempts, and a unit of work is limited to two seconds.
"""
# `ms` is the duration of an attempt that was completed or failed; it is null for every other attempt.
_STATISTICS = """
WITH newest AS (
  SELECT agent_id, agent_version, status, cost_micro, input_tokens, output_tokens, stalls, started_at, finished_at
  FROM tasks_attempts WHERE agent_id = ? AND created_at >= ? ORDER BY created_at DESC LIMIT {newest}
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


class AgentStatisticsService:
    """Implements `AgentStatistics`. Each call runs one query over the newest attempts of one agent.

    An attempt is one claim. The success rate and the durations include only attempts that were completed or failed,
    because attempts that were cancelled or released, or that had to wait, say nothing about the agent.
    """

    def for_agent(self, agent_id: str, *, since: str) -> AttemptStatistics:
        found = _query_attempts("agent_id", agent_id, since)
        return _attempt_statistics(found[0]) if found else _attempt_statistics((0,) * 10)

    def for_versions(self, agent_id: str, versions: Sequence[int]) -> dict[int, AttemptStatistics]:
        found = {int(row[0]): _attempt_statistics(row) for row in _query_attempts("agent_version", agent_id, "")}
        is_whole = sum(statistics.attempts or 0 for statistics in found.values()) < NEWEST
        absent = _attempt_statistics((0,) * 10) if is_whole else AttemptStatistics()
        return {version: found.get(version, absent) for version in versions}


def _query_attempts(group: str, agent_id: str, since: str) -> list[tuple[Any, ...]]:
    sql = _STATISTICS.format(ms=milliseconds_between("started_at", "finished_at"), newest=NEWEST, group=group)
    found: list[tuple[Any, ...]] = execute(sql, [agent_id, since]).fetchall()
    return found


def _attempt_statistics(row: Sequence[Any]) -> AttemptStatistics:
    _, attempts, completed, failed, average, p95, cost, tokens_in, tokens_out, stalls = row
    ended = completed + failed
    return AttemptStatistics(
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
