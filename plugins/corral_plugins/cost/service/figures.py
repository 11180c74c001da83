"""Figures for metrics, from sums."""

from __future__ import annotations

from collections.abc import Mapping

from corral_plugins.cost.service import sums
from corral_plugins.cost.service.money import usd

SHOWN = 50

Values = Mapping[tuple[str, ...], float]


class ProviderFigures:
    """Totals by provider. `names` are the values that the label may take: as many providers as one can look at."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def cost(self) -> Values:
        """USD; corrections count, so it may fall."""
        return {(name,): usd(figures.cost_micro) for name, figures in self._totals()}

    def unpriced_tokens(self) -> Values:
        """Tokens without a price."""
        return {(name,): figures.unpriced_tokens for name, figures in self._totals()}

    def _totals(self) -> list[tuple[str, sums.Came]]:
        found = sums.groups(sums.TOTAL, sums.ALL_TIME, sums.ALL_TIME)
        totals = sorted(((name, figures) for name, _, figures in found if name), key=lambda each: -each[1].calls)
        self.names[:] = [name for name, _ in totals[:SHOWN]]
        return totals
