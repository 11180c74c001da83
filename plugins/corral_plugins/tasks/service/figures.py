"""Figures for metrics, from counters and indexes."""

from __future__ import annotations

from collections.abc import Mapping

from corral_plugins.tasks.models import PRIORITIES, STATUSES
from corral_plugins.tasks.service import tallies
from corral_plugins.tasks.service.fleet import oldest_pending_ms

RESULTS = ("completed", "failed", "cancelled", "released", "lost", "waiting")
STALLS = ("idle", "loop")

Values = Mapping[tuple[str, ...], float]


def tasks_by_status() -> Values:
    """Tasks by status."""
    counts = tallies.matrix()
    return {(status,): sum(counts[(status, rank)] for rank in range(len(PRIORITIES))) for status in STATUSES}


def queue_depth() -> Values:
    """Pending tasks."""
    return {(): tasks_by_status()[("pending",)]}


def oldest_seconds() -> Values:
    """The wait of the oldest pending task."""
    return {(): (oldest_pending_ms() or 0) / 1000}
