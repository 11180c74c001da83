"""Metrics about approvals since the start of this process. Changes are counted when their unit of work commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import peewee

from corral import clock
from corral.database.unit import after_commit
from corral.metrics.histogram import Histogram
from corral.plugin import Metric
from corral_plugins.approvals.api import Status
from corral_plugins.approvals.models import Approval

STATUSES: tuple[str, ...] = get_args(Status)
OUTCOMES = ("approved", "rejected", "expired", "cancelled")
WAITS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0, 604_800.0)


class ApprovalMetrics:
    """Counts outcomes, and measures how long people take to decide."""

    def __init__(self) -> None:
        self._outcomes: Counter[tuple[str, ...]] = Counter()
        self._seconds = Histogram(WAITS)

    def count_outcome(self, row: Approval) -> None:
        """Count the outcome of an approval that has just been resolved."""
        outcome, seconds = row.status, clock.elapsed_ms(row.created_at, row.resolved_at or clock.now()) / 1000
        after_commit(lambda: self._outcomes.update({(outcome,): 1}))
        if outcome in ("approved", "rejected"):
            after_commit(lambda: self._seconds.observe(seconds))

    def definitions(self) -> Iterable[Metric]:
        """Return the definitions of all approval metrics."""
        return [
            Metric(
                name="corral_approvals",
                help="Number of approval requests by status.",
                labels={"status": STATUSES},
                collect=count_by_status,
            ),
            Metric(
                name="corral_approvals_resolved_total",
                help="Number of resolved approval requests by outcome.",
                kind="counter",
                labels={"outcome": OUTCOMES},
                collect=self._outcome_counts,
            ),
            Metric(
                name="corral_approval_decision_seconds",
                help="Time from an approval request to a person's decision, in seconds.",
                kind="histogram",
                collect=self._seconds.read,
            ),
        ]

    def _outcome_counts(self) -> Mapping[tuple[str, ...], float]:
        return self._outcomes


def count_by_status() -> Mapping[tuple[str, ...], float]:
    """Return the number of approvals, keyed by status."""
    rows: Any = Approval.select(Approval.status, peewee.fn.COUNT(Approval.id)).group_by(Approval.status).tuples()
    return {(status,): float(count) for status, count in rows}
