"""Counts of this process since its start, for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from corral.database.unit import after_commit
from corral.metrics.histogram import LONG_SECONDS, Histogram


class Seen:
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
        """Leases that ended without their worker."""
        return {(): self._reclaims}

    def stalls(self) -> Mapping[tuple[str, ...], float]:
        """By kind."""
        return self._stalls
