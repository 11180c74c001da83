"""Metrics of workflows since the start of this process. Values are recorded when the unit of work commits."""

from __future__ import annotations

import peewee

from corral import clock
from corral.database.unit import after_commit
from corral.metrics.histogram import LONG_SECONDS, Histogram
from corral_plugins.workflows.models import Run, fetch_tuples

STATUSES = ("queued", "running", "waiting", "paused")


class WorkflowMetrics:
    """Measures how long steps take, and how long a changed run waits before it is advanced."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.step_seconds = Histogram(LONG_SECONDS)
        self.lag_seconds = Histogram()

    def observe_step(self, type: str, started_at: str | None, finished_at: str | None) -> None:
        """Record the duration of a step that has ended."""
        if started_at is None or finished_at is None:
            return
        seconds = clock.elapsed_ms(started_at, finished_at) / 1000
        label = type if type in self.types else "other"
        after_commit(lambda: self.step_seconds.observe(seconds, (label,)))

    def observe_lag(self, queued_at: str) -> None:
        """Record how long a run waited in the queue before it was advanced."""
        self.lag_seconds.observe(clock.elapsed_ms(queued_at, clock.now()) / 1000)


def count_active_runs() -> dict[tuple[str, ...], float]:
    """Return the number of unfinished runs by status."""
    counts = Run.select(Run.status, peewee.fn.COUNT(Run.id)).where(Run.status.in_(STATUSES)).group_by(Run.status)
    found: dict[tuple[str, ...], float] = {(status,): 0.0 for status in STATUSES}
    return found | {(row[0],): float(row[1]) for row in fetch_tuples(counts)}
