"""Metrics of costs. The gauges are read from the rollups, so that each process shows the totals of the installation."""

from __future__ import annotations

from collections.abc import Mapping

from corral.plugin import Metric
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
                help="Cost by provider in USD. Corrections can lower it.",
                labels=labels,
                collect=self._cost_by_provider,
            ),
            Metric(
                name="corral_cost_unpriced_tokens",
                help="Tokens without a known price, by provider.",
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
