"""Collects the metrics of all plugins and sibling processes for `/metrics`, with timeouts and a cache."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from corral.database.engine import Database, Work
from corral.metrics.histogram import Observed
from corral.plugin import Contributions, Metric
from corral.plugins.guard import Guards
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.registry import PluginRegistry
from corral_core.health.service.plugin_metrics import plugin_metric_lines
from corral_core.health.service.process_metrics import ProcessMetrics, histogram_family
from corral_core.health.service.readiness import ReadinessProbe
from corral_core.health.service.sibling_processes import SiblingProcesses, sum_metrics

KEEP_SECONDS = 1.0
COLLECT_SECONDS = 0.08
FIRST_COLLECT_SECONDS = 1.0

Wrong = Callable[[str, Metric, Exception], None]


class _ContributedMetrics:
    """Caches the values of contributed metrics, which are collected at most once a second.

    If collection takes longer than `COLLECT_SECONDS`, the previous values are reported. The first collection may take
    `FIRST_COLLECT_SECONDS`, because there are no previous values. While the database is unavailable, no values are
    reported.
    """

    def __init__(
        self, work: Work, metrics: Callable[[], list[tuple[str, Metric]]], readiness: ReadinessProbe, wrong: Wrong
    ) -> None:
        self._work, self._metrics, self._readiness, self._wrong = work, metrics, readiness, wrong
        self._asked: tuple[float, asyncio.Task[list[Family]]] | None = None
        self._last: list[Family] = []
        self._patience = FIRST_COLLECT_SECONDS

    async def refresh(self) -> None:
        """Collect the values again if the cache is stale. Call this method before each `collect`."""
        asked = self._asked
        if asked is None or (asked[1].done() and time.monotonic() - asked[0] > KEEP_SECONDS):
            asked = self._asked = (time.monotonic(), asyncio.ensure_future(self._collect_values()))
        done, _ = await asyncio.wait({asked[1]}, timeout=self._patience)
        if done:
            self._last, self._patience = asked[1].result(), COLLECT_SECONDS
        elif not self._readiness.served:
            self._last = []

    def collect(self) -> Iterator[Family]:
        """Yield the metric families. The Prometheus registry calls this method, so it must not do I/O."""
        yield from self._last

    async def _collect_values(self) -> list[Family]:
        metrics = self._metrics() if await self._readiness.database_serves() else []
        reading = [self._work(each.collect, read=True) for _, each in metrics]
        read = await asyncio.gather(*reading, return_exceptions=True)
        families = []
        for (plugin, each), got in zip(metrics, read, strict=True):
            if not isinstance(got, BaseException):
                try:
                    families.append(_metric_family(each, got))
                except Exception as error:  # the number of labels is wrong, or a value is not a number
                    self._wrong(plugin, each, error)
        return families


class MetricsRenderer:
    """Renders all metrics as Prometheus text.

    Per-process metrics (requests, resources and counters) are summed over all processes that serve the same address.
    Metrics of the whole installation are collected only once.
    """

    def __init__(
        self,
        work: Work,
        contributions: Contributions,
        readiness: ReadinessProbe,
        siblings: SiblingProcesses,
        figures: ProcessMetrics,
        registry: PluginRegistry,
        quarantine: PluginQuarantine,
        guards: Guards,
        database: Database,
    ) -> None:
        def contributed(*, of_process: bool) -> list[tuple[str, Metric]]:
            found = contributions.for_hook("corral_metrics")
            return [each for each in found if (each[1].of_process or each[1].kind != "gauge") == of_process]

        def wrong(plugin: str, metric: Metric, error: Exception) -> None:
            if (loaded := registry.get(plugin)) is not None:
                quarantine.count_error(loaded, f"corral_metrics {metric.name}", error)

        self._readiness, self._siblings = readiness, siblings
        self._registry, self._guards, self._database = registry, guards, database
        self._counted = _ContributedMetrics(work, lambda: contributed(of_process=True), readiness, wrong)
        self._measured = _ContributedMetrics(work, lambda: contributed(of_process=False), readiness, wrong)
        self._process, self._installation = (CollectorRegistry(auto_describe=False) for _ in range(2))
        ProcessCollector(registry=self._process)
        self._process.register(figures)
        self._process.register(self._counted)
        self._installation.register(self)
        self._installation.register(self._measured)

    async def render_all(self) -> str:
        """Return the metrics of all sibling processes and of the installation as Prometheus text."""
        own, others, _ = await asyncio.gather(
            self.render_own(), self._siblings.read_siblings(), self._measured.refresh()
        )
        return sum_metrics([own, *others]) + generate_latest(self._installation).decode()

    async def render_own(self) -> str:
        """Return the metrics of this process as Prometheus text."""
        await self._counted.refresh()
        return "\n".join([*self.plugin_lines(), generate_latest(self._process).decode()])

    def plugin_lines(self) -> Iterator[str]:
        """Yield this process's plugin metrics as lines of Prometheus text."""
        return plugin_metric_lines(self._registry.all(), self._guards.all, self._database.watchdog)

    def collect(self) -> Iterator[Family]:
        """Yield the metric families. The Prometheus registry calls this method, so it must not do I/O."""
        from importlib.metadata import version

        yield InfoMetricFamily("corral_build", "Version of Corral.", value={"version": version("corral")})
        up = GaugeMetricFamily("corral_up", "Whether a dependency responds (1) or not (0).", labels=["dependency"])
        up.add_metric(["database"], self._readiness.served)
        yield up
        if (pending := self._readiness.pending_migrations) is not None:
            yield GaugeMetricFamily(
                "corral_migrations_pending", "Number of migration scripts that are not applied.", value=pending
            )


class _TextRegistry:
    """A registry of metrics parsed from Prometheus text. The OpenMetrics exporter accepts only registries."""

    def __init__(self, text: str) -> None:
        self._text = text

    def collect(self) -> Iterator[Family]:
        """Yield the metric families in the text."""
        yield from text_string_to_metric_families(self._text)


def to_openmetrics(text: str) -> str:
    """Convert Prometheus text to OpenMetrics text."""
    from prometheus_client.openmetrics.exposition import generate_latest as generate

    untyped: Any = generate
    return str(untyped(_TextRegistry(text)).decode())


def _sum_observed(one: Observed, other: Observed) -> Observed:
    """Add up the values of the same histogram from two sources."""
    counts = [a + b for a, b in zip(one.counts, other.counts, strict=True)]
    return Observed(one.bounds, counts, one.total + other.total)


def _metric_family(metric: Metric, values: Mapping[tuple[str, ...], Any]) -> Family:
    """Convert collected values to a metric family. Undeclared label values become `other`.

    Replacing them limits the number of time series.
    """
    allowed: list[Any] = [frozenset(known) for known in metric.labels.values()]
    summed: dict[tuple[str, ...], Any] = {}
    for labels, value in values.items():
        kept = tuple(text if text in known else "other" for text, known in zip(labels, allowed, strict=True))
        before = summed.get(kept)
        add: Any = _sum_observed if metric.kind == "histogram" else operator.add
        summed[kept] = value if before is None else add(before, value)
    if metric.kind == "histogram":
        return histogram_family(metric.name, metric.help, tuple(metric.labels), summed)
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family: Any = kind(metric.name, metric.help, labels=list(metric.labels))
    for labels, value in summed.items():
        family.add_metric(labels, float(value))
    return family  # type: ignore[no-any-return]  # both types are families
