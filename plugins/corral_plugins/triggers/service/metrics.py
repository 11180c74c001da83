"""Metrics of the `triggers` plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import peewee

from corral.metrics.histogram import LONG_SECONDS, Histogram
from corral.plugin import Metric
from corral_plugins.triggers.models import LIVING, Trigger

TYPES = ("cron", "interval", "once", "webhook", "event", "absence", "manual")
STATUSES = (
    "fired",
    "skipped_overlap",
    "skipped_missed",
    "filtered",
    "coalesced",
    "duplicate",
    "rate_limited",
    "loop",
    "failed",
)


class TriggerMetrics:
    """Counts slots by their final status, and measures how late they fired."""

    def __init__(self) -> None:
        self._decided: Counter[tuple[str, str]] = Counter()
        self._lag = Histogram(LONG_SECONDS)

    def observe(self, type: str, status: str, lag_seconds: float) -> None:
        """Record the final status of a slot.

        Call this method after the commit of the unit of work that sets the status.
        """
        self._decided[type, status] += 1
        if status == "fired":
            self._lag.observe(max(0.0, lag_seconds))

    def definitions(self) -> list[Metric]:
        """Return the definitions of all trigger metrics."""
        return [
            Metric(
                name="corral_trigger_fires_total",
                help="Number of trigger slots (times, events or deliveries) with a final status, by trigger type and "
                "status.",
                kind="counter",
                labels={"type": TYPES, "status": STATUSES},
                collect=self._collect_decided,
            ),
            Metric(
                name="corral_trigger_lag_seconds",
                help="Delay between the due time of a trigger slot and the firing of the trigger, in seconds.",
                kind="histogram",
                collect=self._lag.read,
            ),
            Metric(
                name="corral_triggers",
                help="Number of triggers, by whether they are enabled.",
                labels={"enabled": ("true", "false")},
                collect=count_triggers,
            ),
        ]

    def _collect_decided(self) -> Mapping[tuple[str, ...], float]:
        return {labels: float(count) for labels, count in self._decided.items()}


def count_triggers() -> Mapping[tuple[str, ...], float]:
    """Return the number of enabled triggers and the number of disabled triggers."""
    rows: Any = Trigger.select(Trigger.enabled, peewee.fn.COUNT(Trigger.id)).where(LIVING).group_by(Trigger.enabled)
    return {("true" if enabled else "false",): float(count) for enabled, count in rows.tuples()}
