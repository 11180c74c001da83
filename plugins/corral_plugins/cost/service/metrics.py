"""Metrics of costs: gauges read from the rollups, so that every process shows the totals of the installation."""

from __future__ import annotations

from collections.abc import Mapping

from corral.plugin import Metric
from corral_plugins.cost.service import rollups
from corral_plugins.cost.service.money import usd

MAX_PROVIDERS = 50
"""How many providers the metrics show: those with the most calls."""

Values = Mapping[tuple[str, ...], float]


class ProviderTotals:
    """Totals by provider."""

    def __init__(self) -> None:
        self._providers: list[str] = []

    def metrics(self) -> list[Metric]:
        """Return the metrics. Their label values are updated with each collection."""
        labels = {"provider": self._providers}
        return [
            Metric(
                name="corral_cost_usd_total",
                help="Cost by provider in USD. Corrections may lower it.",
                labels=labels,
                collect=self._cost,
            ),
            Metric(
                name="corral_cost_unpriced_tokens_total",
                help="Tokens without a known price, by provider.",
                labels=labels,
                collect=self._unpriced_tokens,
            ),
        ]

    def _cost(self) -> Values:
        return {(provider,): usd(totals.cost_micro) for provider, totals in self._totals()}

    def _unpriced_tokens(self) -> Values:
        return {(provider,): totals.unpriced_tokens for provider, totals in self._totals()}

    def _totals(self) -> list[tuple[str, rollups.Totals]]:
        rows = [(provider, totals) for provider, _, totals in rollups.grouped(rollups.TOTAL) if provider]
        rows.sort(key=lambda row: -row[1].calls)
        self._providers[:] = [provider for provider, _ in rows[:MAX_PROVIDERS]]
        return rows
