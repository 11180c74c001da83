"""Metrics of tasks: counters of this process since its start, and gauges that are read from database counters."""

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
    """Counts ended attempts, reclaimed leases, stalled runs and durations.

    An event counts only after its unit of work is committed.
    """

    def __init__(self) -> None:
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._reclaims = 0
        self._stalls: Counter[tuple[str, ...]] = Counter()
        self.durations, self.queueing = Histogram(LONG_SECONDS), Histogram(LONG_SECONDS)
        self.cancelling = Histogram(LONG_SECONDS)

    def attempt_ended(self, result: str, *, by: str) -> None:
        """Count an ended lease. `by` names the call or timer that ended it."""
        after_commit(lambda: self._count(result, by))

    def started(self, queue_ms: int) -> None:
        """Record the time in milliseconds that an attempt waited in the queue until it started."""
        after_commit(lambda: self.queueing.observe(queue_ms / 1000))

    def completed(self, duration_ms: int | None) -> None:
        """Record the duration of a completed task in milliseconds. The duration is null if the task never started."""
        if duration_ms is not None:
            after_commit(lambda: self.durations.observe(duration_ms / 1000))

    def cancelled(self, cancel_ms: int) -> None:
        """Record the time in milliseconds from a cancellation request to the end of the run."""
        after_commit(lambda: self.cancelling.observe(cancel_ms / 1000))

    def stalled(self, kind: str) -> None:
        """Count a stalled run. `kind` is `idle` or `loop`."""
        after_commit(lambda: self._stalls.update([(kind,)]))

    def _count(self, result: str, by: str) -> None:
        self._attempts[(result,)] += 1
        self._reclaims += by == "reaper"

    def attempts(self) -> Values:
        """Return the number of ended attempts by result."""
        return self._attempts

    def reclaims(self) -> Values:
        """Return the number of leases that expired because their worker sent no renewal."""
        return {(): self._reclaims}

    def stalls(self) -> Values:
        """Return the number of stalled runs by kind."""
        return self._stalls


def tasks_by_status() -> Values:
    """Return the number of tasks by status."""
    counts = rollups.status_counts()
    return {(status,): sum(counts[(status, rank)] for rank in range(len(PRIORITIES))) for status in STATUSES}


def queue_depth() -> Values:
    """Return the number of pending tasks."""
    return {(): rollups.pending_tasks()}


def oldest_seconds() -> Values:
    """Return the waiting time of the oldest pending task in seconds."""
    return {(): (rollups.oldest_pending_ms() or 0) / 1000}
