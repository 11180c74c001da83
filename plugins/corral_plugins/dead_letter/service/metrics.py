"""Statistics and metrics about the dead letter queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import peewee

from corral import clock
from corral.plugin import Metric
from corral_plugins.dead_letter.api import REASONS
from corral_plugins.dead_letter.models import DeadLetter
from corral_plugins.dead_letter.shapes import DeadLetterStats
from corral_plugins.tasks.api import Tasks

HOUR, DAY = 3600, 86_400
TOP = 20
SAMPLE = 1000
"""The maximum number of retried tasks, most recent first, from which the success rate is computed."""


class DeadLetterMetrics:
    """Counts new dead letters by reason."""

    def __init__(self) -> None:
        self._added: Counter[str] = Counter()

    def count_added(self, reason: str) -> None:
        """Count a new dead letter after its transaction has been committed."""
        self._added[reason] += 1

    def added_by_reason(self) -> Mapping[tuple[str, ...], float]:
        """Return the number of dead letters that this process added since its start, keyed by reason."""
        return {(reason,): float(count) for reason, count in self._added.items()}

    def definitions(self) -> list[Metric]:
        """Return the definitions of all metrics about the dead letter queue."""
        return [
            Metric(name="corral_dead_letters", help="Number of open dead letters.", collect=_open_letters),
            Metric(
                name="corral_dead_letters_added_total",
                help="Number of new dead letters by reason.",
                kind="counter",
                labels={"reason": REASONS},
                collect=self.added_by_reason,
            ),
            Metric(
                name="corral_dead_letter_oldest_seconds",
                help="Age of the oldest open dead letter, in seconds.",
                collect=_oldest_seconds,
            ),
        ]


class DeadLetterStatistics:
    """Computes the statistics of the queue. Every method runs in the caller's unit of work."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def read(self) -> DeadLetterStats:
        """Return the statistics. Unknown values are null.

        `by_reason` includes all reasons, even those without a dead letter.
        """
        counts = _count_by(DeadLetter.reason, limit=len(REASONS))
        return DeadLetterStats(
            total=sum(counts.values()),
            by_reason={reason: counts.get(reason, 0) for reason in REASONS},
            by_error_type=_count_by(DeadLetter.error_type, limit=TOP),
            by_agent=_count_by(DeadLetter.agent_id, limit=TOP),
            oldest_age_ms=oldest_age_ms(),
            added_1h=added_since(HOUR),
            added_24h=added_since(DAY),
            retried_24h=_retried_in_a_day().count(),
            retry_success_rate=self._success_rate(),
        )

    def _success_rate(self) -> float | None:
        """Return the fraction of retried tasks that completed, or None if none of them has ended."""
        newest: Any = _retried_in_a_day().order_by(DeadLetter.resolved_at.desc()).limit(SAMPLE)
        task_ids = {row.task_id for row in newest}
        ended = [status for status, at in self._tasks.statuses(sorted(task_ids)).values() if at is not None]
        return ended.count("completed") / len(ended) if ended else None


def added_since(seconds: int) -> int:
    """Return the number of dead letters added in the last `seconds` seconds."""
    return int(DeadLetter.select().where(DeadLetter.created_at > clock.now(-seconds)).count())


def top_reason(seconds: int) -> str:
    """Return the most frequent reason among the dead letters added in the last `seconds` seconds."""
    recent = DeadLetter.created_at > clock.now(-seconds)
    return next(iter(_count_by(DeadLetter.reason, limit=1, where=recent)), "none")


def oldest_age_ms() -> int | None:
    """Return the age of the oldest open dead letter in milliseconds, or None if there is none."""
    is_open = DeadLetter.status == "open"
    oldest: Any = DeadLetter.select(peewee.fn.MIN(DeadLetter.created_at)).where(is_open).tuples().first()
    return None if oldest is None or oldest[0] is None else clock.elapsed_ms(oldest[0], clock.now())


def _retried_in_a_day() -> Any:
    recent = peewee.SQL("status = 'retried'") & (DeadLetter.resolved_at > clock.now(-DAY))
    return DeadLetter.select(DeadLetter.task_id, DeadLetter.resolved_at).where(recent)


def _count_by(field: Any, *, limit: int, where: Any = None) -> dict[str, int]:
    """Count dead letters by the values of a field. The most frequent value comes first.

    By default, only open dead letters are counted.
    """
    chosen = DeadLetter.status == "open" if where is None else where
    count = peewee.fn.COUNT(DeadLetter.id)
    found: Any = (
        DeadLetter.select(field, count).where(chosen).group_by(field).order_by(count.desc(), field).limit(limit)
    )
    return {value if value is not None else "none": n for value, n in found.tuples()}


def _open_letters() -> dict[tuple[str, ...], float]:
    return {(): float(DeadLetter.select().where(DeadLetter.status == "open").count())}


def _oldest_seconds() -> dict[tuple[str, ...], float]:
    return {(): (oldest_age_ms() or 0) / 1000}
