"""Review metrics since the start of this process. Values are counted when the unit of work commits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import peewee

from corral import clock
from corral.database.unit import after_commit
from corral.metrics.histogram import Histogram
from corral.plugin import Metric
from corral_plugins.code_reviews.api import ReviewStatus
from corral_plugins.code_reviews.models import Review

STATUSES: tuple[str, ...] = get_args(ReviewStatus)
WAITS = (60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0, 604_800.0)
ROUNDS = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)


class ReviewMetrics:
    """Measures the time until reviews are decided, and how often diffs are sent back before the decision."""

    def __init__(self) -> None:
        self._seconds, self._rounds = Histogram(WAITS), Histogram(ROUNDS)

    def count_decision(self, row: Review) -> None:
        """Count a review that has just been approved or rejected."""
        seconds, rounds = clock.elapsed_ms(row.created_at, row.decided_at or clock.now()) / 1000, float(row.round)
        after_commit(lambda: self._seconds.observe(seconds))
        after_commit(lambda: self._rounds.observe(rounds))

    def definitions(self) -> Iterable[Metric]:
        """Return the definitions of the review metrics."""
        return [
            Metric(
                name="corral_code_reviews",
                help="Number of code reviews by status.",
                labels={"status": STATUSES},
                collect=count_by_status,
            ),
            Metric(
                name="corral_code_review_decision_seconds",
                help="Time from the opening of a code review to its decision, in seconds.",
                kind="histogram",
                collect=self._seconds.read,
            ),
            Metric(
                name="corral_code_review_rounds",
                help="Number of times that a code review was sent back to its agent before it was decided.",
                kind="histogram",
                collect=self._rounds.read,
            ),
        ]


def count_by_status() -> Mapping[tuple[str, ...], float]:
    """Return the number of reviews by status."""
    found: Any = Review.select(Review.status, peewee.fn.COUNT(Review.id)).group_by(Review.status).tuples()
    return {(status,): float(count) for status, count in found}
