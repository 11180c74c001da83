"""Metrics of the `webhooks` plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import peewee

from corral import clock
from corral.plugin import Metric
from corral_plugins.webhooks.models import Delivery

OUTCOMES = ("success", "timeout", "connect", "tls", "dns", "blocked", "status")
STATUSES = ("pending", "retrying", "succeeded", "failed", "cancelled")


class WebhookMetrics:
    """Counts the delivery attempts of this process."""

    def __init__(self) -> None:
        self._attempts: Counter[tuple[str, ...]] = Counter()

    def count(self, outcome: str) -> None:
        """Count an attempt by its outcome. Must be called on the event loop."""
        self._attempts[(outcome,)] += 1

    def definitions(self) -> list[Metric]:
        """Return the definitions of all webhook metrics."""
        return [
            Metric(
                name="corral_webhook_attempts_total",
                help="Number of attempts to deliver events to webhooks, by outcome.",
                kind="counter",
                labels={"outcome": OUTCOMES},
                collect=self._collect_attempts,
            ),
            Metric(
                name="corral_webhook_lag_seconds",
                help="Delay of the most overdue delivery to a webhook, in seconds.",
                collect=longest_lag,
            ),
            Metric(
                name="corral_webhook_deliveries",
                help="Number of deliveries to webhooks by status.",
                labels={"status": STATUSES},
                collect=count_deliveries,
            ),
        ]

    def _collect_attempts(self) -> Mapping[tuple[str, ...], float]:
        return {labels: float(count) for labels, count in self._attempts.items()}


def longest_lag() -> Mapping[tuple[str, ...], float]:
    """Return how many seconds ago the most overdue delivery became due, or 0 if no delivery is waiting."""
    due: Any = Delivery.select(peewee.fn.MIN(Delivery.due_at)).where(Delivery.due_at.is_null(False)).scalar()
    return {(): 0.0 if due is None else max(0.0, clock.time_s() - clock.parse_instant(due))}


def count_deliveries() -> Mapping[tuple[str, ...], float]:
    """Return the number of deliveries, keyed by status."""
    rows: Any = Delivery.select(Delivery.status, peewee.fn.COUNT(Delivery.id)).group_by(Delivery.status)
    return {(status,): float(count) for status, count in rows.tuples()}
