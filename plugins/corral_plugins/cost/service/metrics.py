"""Cost metrics. The gauges are read from the rollups, so that each process shows the totals of the installation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from corral.plugin import Metric
from corral_plugins.cost.models import BudgetCounter, Reservation
from corral_plugins.cost.service import rollups
from corral_plugins.cost.service.money import to_usd

MAX_PROVIDERS = 50
"""The maximum number of providers in the metrics, which show the providers with the most calls."""

Values = Mapping[tuple[str, ...], float]


class ProviderTotals:
    """Collects the total costs by provider for the metrics."""

    def __init__(self) -> None:
        self._providers: list[str] = []

    def metrics(self) -> list[Metric]:
        """Return the definitions of the metrics.

        The values of the `provider` label are updated whenever the metrics are collected.
        """
        labels = {"provider": self._providers}
        return [
            Metric(
                name="corral_cost_usd",
                help="Cost by provider, in USD. Corrections can lower the value.",
                labels=labels,
                collect=self._cost_by_provider,
            ),
            Metric(
                name="corral_cost_unpriced_tokens",
                help="Number of tokens without a known price, by provider.",
                labels=labels,
                collect=self._unpriced_tokens,
            ),
        ]

    def _cost_by_provider(self) -> Values:
        return {(provider,): to_usd(totals.cost_micro) for provider, totals in self._read_totals()}

    def _unpriced_tokens(self) -> Values:
        return {(provider,): totals.unpriced_tokens for provider, totals in self._read_totals()}

    def _read_totals(self) -> list[tuple[str, rollups.RollupCounters]]:
        rows = [(provider, totals) for provider, _, totals in rollups.grouped_totals(rollups.TOTAL) if provider]
        rows.sort(key=lambda row: -row[1].calls)
        self._providers[:] = [provider for provider, _ in rows[:MAX_PROVIDERS]]
        return rows


SCOPES = ("global", "agent", "task")


class BudgetRefusals:
    """Counts the paid operations refused because of a budget, by budget scope. There is one instance per kernel."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def count(self, scope: str) -> None:
        """Count a refused operation immediately, because its unit of work never commits."""
        self._counts[scope] += 1

    def by_scope(self) -> Values:
        """Return the number of refused operations by budget scope, as the values of a metric."""
        return {(scope,): float(self._counts[scope]) for scope in SCOPES}


class BudgetMetrics:
    """Metrics about budgets and reservations."""

    def __init__(self, refusals: BudgetRefusals) -> None:
        self._refusals = refusals

    def metrics(self) -> list[Metric]:
        """Return the definitions of the metrics."""
        return [
            Metric(
                name="corral_budget_ratio",
                help="Fraction of the installation's budget spent so far in the current month.",
                collect=_spent_ratio,
            ),
            Metric(
                name="corral_budget_refusals_total",
                help="Number of paid operations refused because of a budget, by budget scope.",
                kind="counter",
                labels={"scope": SCOPES},
                collect=self._refusals.by_scope,
            ),
            Metric(
                name="corral_reservations",
                help="Number of budget reservations held for running attempts and calls.",
                collect=lambda: {(): float(Reservation.select().count())},
            ),
        ]


def _spent_ratio() -> Values:
    """Return the spent share of the installation's budget in the newest period, or no value if there is no budget."""
    newest = (
        BudgetCounter.select(BudgetCounter.spent_micro, BudgetCounter.limit_micro)
        .where(BudgetCounter.scope == "global")
        .order_by(BudgetCounter.period.desc())
        .tuples()
        .first()
    )
    return {} if newest is None or not newest[1] else {(): newest[0] / newest[1]}
