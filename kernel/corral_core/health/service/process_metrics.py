"""Metrics of this process: requests, event loop, threads, connections and units of work."""

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
    def max_seconds(self) -> float:
        """The maximum lag of the event loop in the last 15 s, in seconds."""
        return max(self._seen)

    async def measure_lag(self) -> None:
        """Measure the lag until cancelled. The kernel supervises this task."""
        while True:
            due = time.monotonic() + LOOK_EVERY
            await asyncio.sleep(LOOK_EVERY)
            lag = max(0.0, time.monotonic() - due)
            self._seen.append(lag)
            if lag > HELD_UP:
                log.warning("the event loop was blocked", extra={"duration_ms": round(lag * 1000)})


class ProcessMetrics:
    """Collects the metrics of this process."""

    def __init__(self, database: Database, lag: LoopLag, requests: RequestMetrics) -> None:
        self._database, self._lag, self._requests = database, lag, requests

    def collect(self) -> Iterator[Family]:
        """Yield the metric families. The Prometheus registry calls this method, so it must not do I/O."""
        yield from self._request_families()
        database = self._database
        yield GaugeMetricFamily(
            "corral_loop_lag_seconds", "Maximum lag of the event loop, in seconds.", value=self._lag.max_seconds
        )
        yield GaugeMetricFamily(
            "corral_executor_queue", "Number of units of work that are waiting for a thread.", value=database.waiting()
        )
        used, _ = database.connection_usage()
        yield GaugeMetricFamily("corral_db_pool_in_use", "Number of database connections in use.", value=used)
        units = database.timings.units.read()
        yield histogram_family("corral_db_transaction_seconds", "Duration of a unit of work, in seconds.", (), units)
        waits = database.timings.waits.read()
        yield histogram_family(
            "corral_db_lock_wait_seconds",
            "Time that units of work waited for a thread and a connection, in seconds.",
            (),
            waits,
        )
        errors = database.timings.errors
        yield _counter(
            "corral_db_errors_total", "Number of units of work that failed with a database error.", "kind", errors
        )

    def _request_families(self) -> Iterator[Family]:
        requests = self._requests
        answered = CounterMetricFamily(
            "corral_http_requests_total", "Number of answered requests.", labels=["method", "route", "status"]
        )
        for (method, route, status), count in sorted(requests.requests.items()):
            answered.add_metric([method, route, f"{status}xx"], count)
        yield answered
        yield histogram_family(
            "corral_http_request_seconds", "Time to answer a request, in seconds.", ("route",), requests.seconds.read()
        )
        yield GaugeMetricFamily("corral_http_in_flight", "Number of requests in progress.", value=requests.in_flight)
        rejected = requests.body_rejected
        yield _counter(
            "corral_http_body_rejected_total", "Number of rejected request bodies, by reason.", "reason", rejected
        )
        yield _counter("corral_plugin_errors_total", "Number of plugin errors.", "plugin", requests.plugin_errors)
        yield _counter("corral_events_total", "Number of committed events by type.", "type", requests.events)


def _counter(name: str, help_text: str, label: str, counts: Counter[str]) -> Family:
    family = CounterMetricFamily(name, help_text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def histogram_family(
    name: str, help_text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], Observed]
) -> Family:
    """Convert observed values to a Prometheus histogram family."""
    family = HistogramMetricFamily(name, help_text, labels=labels)
    for each, observed in values.items():
        total, buckets = 0, []
        for bound, count in zip((*map(str, observed.bounds), "+Inf"), observed.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(each, buckets=buckets, sum_value=observed.total)
    return family
