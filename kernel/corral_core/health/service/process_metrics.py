"""Metrics of this process that need no unit of work: event loop, threads, connections, units and failed units."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family

from corral.database.engine import Database
from corral.metrics.histogram import Observed

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

    def __init__(self, database: Database, lag: LoopLag) -> None:
        self._database, self._lag = database, lag

    def collect(self) -> Iterator[Family]:
        """Yield the metric families. The Prometheus registry calls this function, which must not do I/O."""
        database = self._database
        yield GaugeMetricFamily(
            "corral_loop_lag_seconds", "Maximum lag of the event loop, in seconds.", value=self._lag.max_seconds
        )
        yield GaugeMetricFamily(
            "corral_executor_queue", "Number of units of work that are waiting for a thread.", value=database.waiting()
        )
        used, _ = database.busy()
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
        errors = CounterMetricFamily(
            "corral_db_errors_total", "Number of units of work that failed with a database error.", labels=["kind"]
        )
        for kind, count in sorted(database.timings.errors.items()):
            errors.add_metric([kind], count)
        yield errors


def histogram_family(name: str, told: str, labels: tuple[str, ...], values: dict[tuple[str, ...], Observed]) -> Family:
    """Convert observed values to a Prometheus histogram family. `told`: the help text of the metric."""
    family = HistogramMetricFamily(name, told, labels=labels)
    for each, observed in values.items():
        total, buckets = 0, []
        for bound, count in zip((*map(str, observed.bounds), "+Inf"), observed.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(each, buckets=buckets, sum_value=observed.total)
    return family
