"""The values in the response to `GET /tasks/stats`.

Statistics for all tasks come from counters and hourly statistics. Statistics for a subset of the tasks come from
indexes and samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.database.dialect import milliseconds_between
from corral.database.statement import Statement
from corral_plugins.tasks.models import PRIORITIES, STATUSES, Task
from corral_plugins.tasks.service import rows, statistics
from corral_plugins.tasks.service.filters import FEW, with_index, without_index
from corral_plugins.tasks.service.statistics import HOUR_FIELDS
from corral_plugins.tasks.shapes import TaskStats, TaskStatsQuery

SAMPLE = 1_000
"""The maximum number of recent runs from which the rates and averages for a subset of the tasks are computed."""

_WAITING = Statement(
    lambda p: (
        Task.select(Task.waiting_kind, peewee.fn.COUNT(Task.id))
        .where(peewee.SQL("status = 'waiting'"))
        .group_by(Task.waiting_kind)
        .tuples()
    )
)


def _count_since(column: peewee.Field) -> Statement:
    """Return a statement that counts the tasks with a given value in the column.

    The statement counts only tasks created since a given time, and reads only the index on the column.
    """
    count = Task.select(peewee.fn.COUNT(peewee.SQL("*")))
    return Statement(lambda p: count.where((column == p("value")) & (Task.created_at >= p("since"))).tuples())


_STATUS_SINCE, _PRIORITY_SINCE = _count_since(Task.status), _count_since(Task.priority)


def read_stats(query: TaskStatsQuery) -> TaskStats:
    """Return the statistics of the tasks that match the query."""
    if query.since is UNSET and query.agent_id is UNSET:
        by_status, by_priority = _totals_by_status_and_priority(statistics.status_counts())
        waiting, day, oldest = _WAITING.rows({}), statistics.sums_of_last_day(), statistics.oldest_pending_ms()
        return task_stats(by_status, by_priority, dict(waiting), day=day, oldest=oldest)
    since = None if isinstance(query.since, msgspec.UnsetType) else clock.from_datetime(query.since)
    agent_id = query.agent_id.lower() if isinstance(query.agent_id, str) else None

    def conditions(column: Callable[[peewee.Field], Any]) -> list[Any]:
        of_agent = [] if agent_id is None else [column(Task.agent_id) == agent_id]
        return of_agent if since is None else [*of_agent, column(Task.created_at) >= since]

    if agent_id is None:
        by_status, by_priority = _counts_since(since or "")
    else:
        by_status, by_priority = _counts_of_agent(conditions(with_index))
    is_few = by_status.total() <= FEW
    where = conditions(with_index if is_few else without_index)
    waits = Task.select(Task.waiting_kind, peewee.fn.COUNT(Task.id)).where(peewee.SQL("status = 'waiting'"), *where)
    waiting = rows.fetch_tuples(waits.group_by(Task.waiting_kind))
    oldest = _oldest_ms(where, is_few=is_few) if by_status["pending"] else None
    day = _sampled_sums(where, is_few=is_few)
    return task_stats(by_status, by_priority, dict(waiting), day=day, oldest=oldest)


def task_stats(
    by_status: Counter[str],
    by_priority: Counter[int],
    waiting: Mapping[str, int],
    *,
    day: Mapping[str, int] = MappingProxyType({}),
    oldest: int | None = None,
) -> TaskStats:
    """Return the statistics with every field set. `day` contains the sums of `HOUR_FIELDS` over the last 24 hours."""
    completed, failed, queued = [day.get(name, 0) for name in ("completed", "failed", "queued")]
    ended = completed + failed
    return TaskStats(
        total=by_status.total(),
        by_status={status: by_status[status] for status in STATUSES},
        by_priority={name: by_priority[rank] for rank, name in enumerate(PRIORITIES)},
        oldest_pending_ms=oldest,
        success_rate_24h=completed / ended if ended else None,
        avg_duration_ms=round(day["duration_ms"] / completed) if completed else None,
        avg_queue_ms=round(day["queue_ms"] / queued) if queued else None,
        waiting_for={kind: waiting.get(kind, 0) for kind in ("approval", "input", "review")},
    )


def _counts_of_agent(where: list[Any]) -> tuple[Counter[str], Counter[int]]:
    by = Task.select(Task.status, Task.priority, peewee.fn.COUNT(Task.id)).where(*where)
    found = rows.fetch_tuples(by.group_by(Task.status, Task.priority))
    return _totals_by_status_and_priority(Counter({(status, rank): n for status, rank, n in found}))


def _counts_since(since: str) -> tuple[Counter[str], Counter[int]]:
    return _count_each(_STATUS_SINCE, STATUSES, since), _count_each(_PRIORITY_SINCE, range(len(PRIORITIES)), since)


def _totals_by_status_and_priority(counts: Counter[tuple[str, int]]) -> tuple[Counter[str], Counter[int]]:
    by_status: Counter[str] = Counter()
    by_priority: Counter[int] = Counter()
    for (status, rank), n in counts.items():
        by_status[status] += n
        by_priority[rank] += n
    return by_status, by_priority


def _count_each(statement: Statement, values: Iterable[Any], since: str) -> Counter[Any]:
    return Counter({value: (statement.one({"value": value, "since": since}) or (0,))[0] for value in values})


def _oldest_ms(where: list[Any], *, is_few: bool) -> int:
    """Return how long the oldest pending task that matches the conditions `where` has been waiting, in milliseconds.

    If few tasks match, all of them are read. If many match, the oldest is found near the beginning of the index of
    waiting tasks.
    """
    if is_few:
        queries = [Task.select(peewee.fn.MIN(Task.queued_at)).where(rows.PENDING, *where)]
    else:
        waiting = Task.select(Task.queued_at).where(rows.PENDING, peewee.SQL("queue IS NOT NULL"), *where)
        each = [waiting.where(Task.rank == rank, Task.priority == priority) for rank, priority in statistics.RANKS]
        queries = [query.order_by(Task.queued_at).limit(1) for query in each]
    first = min((at for query in queries for (at,) in rows.fetch_tuples(query) if at is not None), default=None)
    return 0 if first is None else clock.elapsed_ms(first, clock.now())


def _sampled_sums(where: list[Any], *, is_few: bool) -> Counter[str]:
    """Return the same sums as `sums_of_last_day`, but only for tasks that match the conditions `where`.

    The sums are computed from the times at which each task last started and ended. The tasks are a sample: the tasks
    that ended most recently, and tasks that have started but not ended. If few tasks match, the database engine does
    not use the index on `finished_at`, because it would have to read all ended tasks to find the matching ones.
    """
    began = statistics.start_of_last_day()
    columns = (Task.status, Task.queued_at, Task.started_at, Task.finished_at)
    ended_at = without_index(Task.finished_at) if is_few else Task.finished_at
    ended = peewee.SQL("finished_at IS NOT NULL") & (ended_at >= began)
    newest = Task.select(*columns).where(ended, *where).order_by(ended_at.desc()).limit(SAMPLE)
    open_ones = Task.status.in_(("running", "waiting", "cancelling")) & (Task.started_at >= began)
    running = Task.select(*columns).where(open_ones, *where).limit(SAMPLE)
    done, failed = [f"status = '{status}'" for status in ("completed", "failed")]
    started = f"started_at >= '{began}' AND queued_at <= started_at"  # not queued again since
    ran, queued = milliseconds_between("started_at", "finished_at"), milliseconds_between("queued_at", "started_at")
    sums = [
        peewee.SQL(f"COALESCE(SUM(CASE WHEN {condition} THEN {value} ELSE 0 END), 0)")
        for condition, value in ((done, 1), (failed, 1), (done, ran), (started, 1), (started, queued))
    ]
    total: Counter[str] = Counter()
    for some in (newest, running):
        found = rows.fetch_tuples(peewee.Select([some], sums).bind(Task._meta.database))[0]
        total.update({name: int(n) for name, n in zip(HOUR_FIELDS, found, strict=True)})
    return total
