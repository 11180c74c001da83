"""Metrics of the `messages` plugin. Values are recorded only when the unit of work commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from peewee import SQL

from corral import clock
from corral.database.unit import after_commit
from corral.metrics.histogram import LONG_SECONDS, Histogram
from corral.plugin import Metric
from corral_plugins.messages.api import MESSAGE_TYPES
from corral_plugins.messages.models import Receipt


class MessageMetrics:
    """Counts sent messages, and measures how long messages wait until their delivery."""

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()
        self._delivery = Histogram(LONG_SECONDS)

    def count_sent(self, type: str) -> None:
        """Count a sent message of this type."""
        after_commit(lambda: self._sent.update([type]))

    def observe_delivery(self, waited_ms: int) -> None:
        """Record how many milliseconds passed between the sending of a message and its first delivery."""
        after_commit(lambda: self._delivery.observe(waited_ms / 1000))

    def sent_by_type(self) -> Mapping[tuple[str, ...], float]:
        """Return the number of sent messages, keyed by type."""
        return {(type,): float(count) for type, count in self._sent.items()}

    def definitions(self) -> list[Metric]:
        """Return the definitions of all message metrics."""
        return [
            Metric(
                name="corral_messages_total",
                help="Number of sent messages by type.",
                kind="counter",
                labels={"type": MESSAGE_TYPES},
                collect=self.sent_by_type,
            ),
            Metric(
                name="corral_messages_undelivered",
                help="Number of messages that are waiting for delivery, counted once per recipient.",
                collect=count_undelivered,
            ),
            Metric(
                name="corral_message_delivery_seconds",
                help="Time from sending a message to its first delivery, in seconds.",
                kind="histogram",
                collect=self._delivery.read,
            ),
        ]


def count_undelivered() -> dict[tuple[str, ...], float]:
    """Return the number of receipts that are neither delivered nor expired."""
    waiting = SQL("status = 'sent'") & (Receipt.expires_at > clock.now())
    return {(): float(Receipt.select().where(waiting).count())}
