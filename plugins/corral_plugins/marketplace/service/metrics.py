"""Metrics of the `marketplace` plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import peewee

from corral.plugin import Metric
from corral_marketplace import catalogue
from corral_plugins.marketplace.models import StoredTemplate

SOURCES = ("bundled", "plugin", "uploaded", "remote")
OUTCOMES = ("installed", "failed")


class MarketplaceMetrics:
    """Counts the installations since the start of this process, and the available templates."""

    def __init__(self) -> None:
        self._installs: Counter[tuple[str, ...]] = Counter()
        self._bundled, self.of_plugins = catalogue.count(), 0

    def count(self, outcome: str) -> None:
        """Count an installation by its outcome."""
        self._installs[outcome,] += 1

    def definitions(self) -> Iterable[Metric]:
        """Return the definitions of all marketplace metrics."""
        return [
            Metric(
                name="corral_marketplace_templates",
                help="Number of templates by source.",
                labels={"source": SOURCES},
                collect=self._template_counts,
            ),
            Metric(
                name="corral_marketplace_installs_total",
                help="Number of template installations by outcome.",
                kind="counter",
                labels={"outcome": OUTCOMES},
                collect=self._install_counts,
            ),
        ]

    def _template_counts(self) -> Mapping[tuple[str, ...], float]:
        rows: Any = StoredTemplate.select(StoredTemplate.source, peewee.fn.COUNT(StoredTemplate.slug.distinct()))
        stored: dict[tuple[str, ...], float] = {
            (source,): float(count) for source, count in rows.group_by(StoredTemplate.source).tuples()
        }
        return {("bundled",): float(self._bundled), ("plugin",): float(self.of_plugins), **stored}

    def _install_counts(self) -> Mapping[tuple[str, ...], float]:
        return self._installs
