"""Metrics of the `notifications` plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import peewee

from corral import clock
from corral.plugin import Metric
from corral_plugins.notifications.models import Delivery

CHANNEL_TYPES, OTHER = ("email", "slack", "telegram", "webhook"), "other"
OUTCOMES = ("success", "failure")


class NotificationMetrics:
    """Counts the delivery attempts of this process."""

    def __init__(self) -> None:
        self._attempts: Counter[tuple[str, ...]] = Counter()

    def count(self, channel_type: str, outcome: str) -> None:
        """Count a delivery attempt. Called on the event loop."""
        self._attempts[channel_type if channel_type in CHANNEL_TYPES else OTHER, outcome] += 1

    def definitions(self) -> list[Metric]:
        """Return the definitions of all notification metrics."""
        return [
            Metric(
                name="corral_notifications_total",
                help="Number of attempts to send notifications, by channel type and outcome.",
                kind="counter",
                labels={"channel_type": (*CHANNEL_TYPES, OTHER), "outcome": OUTCOMES},
                collect=self._collect_attempts,
            ),
            Metric(
                name="corral_notification_lag_seconds",
                help="Delay of the most overdue notification, in seconds.",
                collect=longest_lag,
            ),
        ]

    def _collect_attempts(self) -> Mapping[tuple[str, ...], float]:
        return {labels: float(count) for labels, count in self._attempts.items()}


def longest_lag() -> Mapping[tuple[str, ...], float]:
    """Return the number of seconds by which the longest-waiting delivery is overdue."""
    due: Any = Delivery.select(peewee.fn.MIN(Delivery.due_at)).where(Delivery.due_at.is_null(False)).scalar()
    return {(): 0.0 if due is None else max(0.0, clock.time_s() - clock.parse_instant(due))}
