"""Metrics of tasks: counts of this process since its start, and gauges that are read from counters and indexes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from corral.database.unit import after_commit
from corral.metrics.histogram import LONG_SECONDS, Histogram
from corral_plugins.tasks.models import PRIORITIES, STATUSES
from corral_plugins.tasks.service import rollups

RESULTS = ("completed", "failed", "cancelled", "released", "lost", "waiting")
STALLS = ("idle", "loop")

Values = Mapping[tuple[str, ...], float]


class TaskMetrics:
    """Ended attempts, reclaimed leases, stalled runs and durations. An event counts once its unit is committed."""

    def __init__(self) -> None:
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._reclaims = 0
        self._stalls: Counter[tuple[str, ...]] = Counter()
        self.durations, self.queueing = Histogram(LONG_SECONDS), Histogram(LONG_SECONDS)
        self.cancelling = Histogram(LONG_SECONDS)

    def attempt_ended(self, result: str, *, by: str) -> None:
        """Count the end of a lease. `by` names the call or timer that ended it."""
        after_commit(lambda: self._count(result, by))

    def started(self, queue_ms: int) -> None:
        """Observe how long an attempt waited in the queue until it started."""
        after_commit(lambda: self.queueing.observe(queue_ms / 1000))

    def completed(self, duration_ms: int | None) -> None:
        """Observe the duration of a completed task; null when it never started."""
        if duration_ms is not None:
            after_commit(lambda: self.durations.observe(duration_ms / 1000))

    def cancelled(self, cancel_ms: int) -> None:
        """Observe how long a run went on after its cancellation was requested."""
        after_commit(lambda: self.cancelling.observe(cancel_ms / 1000))

    def stalled(self, kind: str) -> None:
        """Count a run that was found idle or in a loop."""
        after_commit(lambda: self._stalls.update([(kind,)]))

    def _count(self, result: str, by: str) -> None:
        self._attempts[(result,)] += 1
        self._reclaims += by == "reaper"

    def attempts(self) -> Values:
        """Ended attempts by result."""
        return self._attempts

    def reclaims(self) -> Values:
        """Leases that expired because their worker gave no sign of life."""
        return {(): self._reclaims}

    def stalls(self) -> Values:
        """Stalled runs by kind."""
        return self._stalls


def tasks_by_status() -> Values:
    """The number of tasks by status."""
    counts = rollups.status_counts()
    return {(status,): sum(counts[(status, rank)] for rank in range(len(PRIORITIES))) for status in STATUSES}


def queue_depth() -> Values:
    """The number of pending tasks."""
    return {(): rollups.pending_tasks()}


def oldest_seconds() -> Values:
    """How long the oldest pending task has been waiting."""
    return {(): (rollups.oldest_pending_ms() or 0) / 1000}
