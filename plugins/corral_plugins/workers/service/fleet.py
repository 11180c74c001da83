"""Read-only queries about all workers: the list, single workers, the overview, metrics and health checks."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from peewee import fn

from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.statement import Statement
from corral.errors import NotFound
from corral.http.page import Page, newest_first, paginate
from corral.plugin import Settings
from corral.schema.strict_json import count_of
from corral_plugins.tasks.api import QueueStatistics, Tasks
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import repository
from corral_plugins.workers.settings import AUTO_APPROVE
from corral_plugins.workers.shapes import (
    AdminWorker,
    FleetOverview,
    GroupTotals,
    WorkerDetail,
    WorkerError,
    WorkerListQuery,
    WorkerView,
)

STATUSES = ("pending", "online", "offline", "draining", "rejected")
LONG_WAIT_MS = 60_000

_TOTALS = Statement(
    lambda p: (
        Worker.select(
            Worker.group,
            Worker.status,
            fn.COUNT(Worker.id),
            fn.SUM(Worker.max_agents),
            fn.SUM(Worker.active_leases),
            fn.SUM(Worker.cpu_usage_percent),
            fn.COUNT(Worker.cpu_usage_percent),
            fn.SUM(Worker.memory_usage_percent),
            fn.COUNT(Worker.memory_usage_percent),
            fn.SUM(Worker.disk_usage_percent),
            fn.COUNT(Worker.disk_usage_percent),
        )
        .group_by(Worker.group, Worker.status)
        .tuples()
    )
)


class WorkerTotals(msgspec.Struct, frozen=True):
    """Totals of the workers with the same group and status.

    `cpu`, `memory` and `disk` are pairs: the sum of the reported percentages, and the number of workers that reported
    one.
    """

    group: str | None
    status: str
    count: int
    capacity: int
    leases: int
    cpu: tuple[float, int]
    memory: tuple[float, int]
    disk: tuple[float, int]


class Fleet:
    """Queries about all workers. The methods run in the caller's unit of work."""

    tasks: Tasks | None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def get_detail(self, worker_id: str, *, caller: Principal) -> WorkerDetail:
        """Return a worker with its leases. Raise `NotFound` if the caller may not see the worker."""
        row = Worker.get_or_none((Worker.id == worker_id) & visible(Worker, caller))
        if row is None or (caller.kind == "worker" and caller.worker_id != row.id):
            raise NotFound("There is no worker with this id.")
        leases = self.tasks.leases_of_worker(worker_id) if self.tasks is not None else []
        return repository.worker_view(row, WorkerDetail, leases=leases)

    def list_fleet(self, query: WorkerListQuery, *, caller: Principal) -> Page[WorkerView]:
        """List the workers that match the filters, newest first."""
        found, order = self._matching(query, caller), newest_first(Worker)
        return paginate(found, query, caller, scope="fleet", order=order, make=_worker_view)

    def list_workers(self, query: WorkerListQuery, *, caller: Principal) -> Page[AdminWorker]:
        """List the workers that match the filters, with their last failures, newest first."""
        found, order = self._matching(query, caller), newest_first(Worker)
        return paginate(found, query, caller, scope="workers", order=order, make=_admin_view)

    @staticmethod
    def _matching(query: WorkerListQuery, caller: Principal) -> Any:
        """Return a query for the workers that match the filters and are visible to the caller."""
        found = Worker.select().where(visible(Worker, caller))
        if query.status:
            found = found.where(Worker.status.in_(query.status))
        if query.group:
            found = found.where(Worker.group.in_(query.group))
        if query.label:
            found = found.where(functools.reduce(operator.or_, map(_has_label, query.label)))
        if query.search:
            found = found.where(Worker.name.contains(query.search) | Worker.hostname.contains(query.search))
        return found

    def get_overview(self) -> FleetOverview:
        """Return the totals of all workers."""
        parts = list(fleet_totals())
        count = _count_by_status(parts)
        online = [part for part in parts if part.status == "online"]
        capacity = sum(part.capacity for part in online)
        busy = sum(part.leases for part in online)
        queue = (
            self.tasks.queue_statistics()
            if self.tasks is not None
            else QueueStatistics(depth=0, oldest_pending_ms=None)
        )
        return FleetOverview(
            total=sum(count.values()),
            online=count["online"],
            offline=count["offline"],
            draining=count["draining"],
            pending_approval=count["pending"],
            rejected=count["rejected"],
            capacity=capacity,
            active_leases=sum(part.leases for part in parts),
            utilization=round(busy / capacity, 4) if capacity else None,
            avg_cpu_percent=_average_usage(part.cpu for part in online),
            avg_memory_percent=_average_usage(part.memory for part in online),
            avg_disk_percent=_average_usage(part.disk for part in online),
            queue_depth=queue.depth,
            oldest_pending_ms=queue.oldest_pending_ms,
            by_group=_totals_by_group(parts),
        )

    def workers_health(self) -> tuple[str, str]:
        """Return the result of the health check `workers`: a status and a sentence that explains it.

        A worker that was stopped is also offline, but it has released its leases. Therefore, only an offline worker
        that still has leases counts as a failure.
        """
        totals = list(fleet_totals())
        count, lost = _count_by_status(totals), sum(part.leases for part in totals if part.status == "offline")
        queue = self.tasks.queue_statistics() if self.tasks is not None else None
        if queue is not None and queue.oldest_pending_id is not None and not count["online"]:
            verb = "is" if queue.depth == 1 else "are"
            return "down", f"{count_of(queue.depth, 'task')} {verb} pending, but no worker is online."
        sentence = f"{count['online']} online, {count['offline']} offline, {count['pending']} waiting for approval."
        if self._settings.get(AUTO_APPROVE):
            sentence += " Every worker that registers is approved automatically (workers.auto_approve)."
        if lost:
            were = "was" if lost == 1 else "were"
            return "degraded", f"{sentence} {count_of(lost, 'task')} {were} running on a worker that is offline now."
        return "ok", sentence

    def queue_health(self) -> tuple[str, str]:
        """Return the result of the health check `queue`: a status and a sentence that explains it.

        If a task has been waiting for more than 60 s although workers have free capacity, it is likely that no worker
        can claim the task.
        """
        queue = self.tasks.queue_statistics() if self.tasks is not None else None
        waiting = queue.oldest_pending_ms if queue is not None else None
        free = sum(part.capacity - part.leases for part in fleet_totals() if part.status == "online")
        if waiting is not None and waiting > LONG_WAIT_MS and free > 0:
            more = count_of(free, "more task")
            sentence = f"A task has waited for {waiting // 1000} s although workers can take {more}."
            oldest = queue.oldest_pending_id if queue is not None else None
            return "degraded", f"{sentence} See why: corral tasks explain {oldest}" if oldest else sentence
        return "ok", "No task has waited long while a worker had free capacity."


def fleet_totals() -> Iterable[WorkerTotals]:
    """Read the totals of all workers by group and status, in one query."""
    for group, status, count, capacity, leases, *sums in _TOTALS.rows({}):
        cpu, memory, disk = [(float(sums[at] or 0.0), int(sums[at + 1])) for at in (0, 2, 4)]
        yield WorkerTotals(group, status, int(count), int(capacity or 0), int(leases or 0), cpu, memory, disk)


def _count_by_status(parts: Iterable[WorkerTotals]) -> Counter[str]:
    """Return the number of workers by status."""
    count: Counter[str] = Counter()
    for part in parts:
        count[part.status] += part.count
    return count


def _average_usage(sums: Iterable[tuple[float, int]]) -> float | None:
    found = list(sums)
    workers = sum(count for _, count in found)
    return round(sum(total for total, _ in found) / workers, 2) if workers else None


def _totals_by_group(parts: Iterable[WorkerTotals]) -> dict[str, GroupTotals]:
    """Return the totals of approved workers by group. Workers without a group are counted under the empty string."""
    groups: dict[str, GroupTotals] = {}
    for part in parts:
        if part.status not in repository.APPROVED:
            continue
        group = groups.setdefault(part.group or "", GroupTotals())
        group.total += part.count
        group.active_leases += part.leases
        if part.status == "online":
            group.online += part.count
            group.capacity += part.capacity
    return dict(sorted(groups.items()))


def _has_label(label: str) -> Any:
    """Return the SQL condition for workers with a label. `label` is `key` or `key=value`.

    The condition searches the JSON text of the labels with REPLACE, which, unlike LIKE, has no wildcards and is
    case-sensitive on every database engine.
    """
    key, has_value, value = label.partition("=")
    needle = msgspec.json.encode(key).decode() + ":"
    if has_value:
        needle += msgspec.json.encode(value).decode()
    return fn.REPLACE(Worker.labels, needle, "") != Worker.labels


def _worker_view(row: Worker) -> WorkerView:
    return repository.worker_view(row, WorkerView)


def _admin_view(row: Worker) -> AdminWorker:
    return repository.worker_view(row, AdminWorker, last_errors=msgspec.convert(row.last_errors, list[WorkerError]))


def workers_by_status() -> Mapping[tuple[str, ...], float]:
    """Return the number of workers by status, for the `corral_workers` metric."""
    count = _count_by_status(fleet_totals())
    return {(status,): float(count[status]) for status in STATUSES}


def lease_capacity() -> Mapping[tuple[str, ...], float]:
    """Return the number of leases that online workers may hold, for the `corral_worker_capacity` metric."""
    return {(): float(sum(part.capacity for part in fleet_totals() if part.status == "online"))}


def lease_count() -> Mapping[tuple[str, ...], float]:
    """Return the number of leases that workers hold, for the `corral_worker_leases` metric."""
    return {(): float(sum(part.leases for part in fleet_totals()))}
