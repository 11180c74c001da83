"""Metrics of this process that need no unit of work: requests, event loop, threads, connections and units."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family

from corral.database.engine import Database
from corral.metrics.histogram import Observed
from corral.metrics.requests import RequestMetrics

log = logging.getLogger("corral.loop")

LOOK_EVERY, WINDOW = 0.25, 60  # 60 samples at 0.25 s: a lag is reported for 15 s, so that a scrape observes it
HELD_UP = 0.25


class LoopLag:
    """Measures the lag of the event loop."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque([0.0], maxlen=WINDOW)

    @property
    def seconds(self) -> float:
        """The maximum lag of the event loop in the last 15 s, in seconds."""
        return max(self._seen)

    async def follow(self) -> None:
        """Measure the lag until cancelled. The kernel supervises this task."""
        while True:
            due = time.monotonic() + LOOK_EVERY
            await asyncio.sleep(LOOK_EVERY)
            lag = max(0.0, time.monotonic() - due)
            self._seen.append(lag)
            if lag > HELD_UP:
                log.warning("the event loop was held up", extra={"duration_ms": round(lag * 1000)})


class ProcessMetrics:
    """Collects the metrics of this process."""

    def __init__(self, database: Database, lag: LoopLag, requests: RequestMetrics) -> None:
        self._database, self._lag, self._requests = database, lag, requests

    def collect(self) -> Iterator[Family]:
        """Yield the metric families. The Prometheus registry calls this function, which must not do I/O."""
        yield from self._request_families()
        database = self._database
        yield GaugeMetricFamily("corral_loop_lag_seconds", "Maximum lag of the event loop.", value=self._lag.seconds)
        yield GaugeMetricFamily("corral_executor_queue", "Units waiting for a thread.", value=database.waiting())
        used, _ = database.busy()
        yield GaugeMetricFamily("corral_db_pool_in_use", "Database connections in use.", value=used)
        units = database.timings.units.read()
        yield histogram("corral_db_transaction_seconds", "Duration of a unit of work.", (), units)
        waits = database.timings.waits.read()
        yield histogram(
            "corral_db_lock_wait_seconds", "Time that units waited for their thread and connection.", (), waits
        )
        errors = database.timings.errors
        yield _counter("corral_db_errors_total", "Units that failed with a database error.", "kind", errors)

    def _request_families(self) -> Iterator[Family]:
        requests = self._requests
        answered = CounterMetricFamily(
            "corral_http_requests_total", "Answered requests.", labels=["method", "route", "status"]
        )
        for (method, route, status), count in sorted(requests.requests.items()):
            answered.add_metric([method, route, f"{status}xx"], count)
        yield answered
        yield histogram("corral_http_request_seconds", "Time to answer.", ("route",), requests.seconds.read())
        yield GaugeMetricFamily("corral_http_in_flight", "Requests being served.", value=requests.in_flight)
        rejected = requests.body_rejected
        yield _counter("corral_http_body_rejected_total", "Request bodies that were refused.", "reason", rejected)
        yield _counter("corral_plugin_errors_total", "Errors of plugins.", "plugin", requests.plugin_errors)
        yield _counter("corral_events_total", "Committed events.", "type", requests.events)


def _counter(name: str, told: str, label: str, counts: Counter[str]) -> Family:
    family = CounterMetricFamily(name, told, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def histogram(name: str, told: str, labels: tuple[str, ...], values: dict[tuple[str, ...], Observed]) -> Family:
    """Convert observed values to a Prometheus histogram family. `told`: the help text of the metric."""
    family = HistogramMetricFamily(name, told, labels=labels)
    for each, observed in values.items():
        total, buckets = 0, []
        for bound, count in zip((*map(str, observed.bounds), "+Inf"), observed.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(each, buckets=buckets, sum_value=observed.total)
    return family
