"""Histograms, which count values in buckets, for metrics of the kind `histogram`."""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
OTHER = "other"
LONG_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)


class Observed(NamedTuple):
    """The observations of a histogram: the count for each bucket and the sum of all values.

    `counts` has one more item than `bounds`, for the bucket without an upper bound.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float


class Histogram:
    """Counts observations since the start of the process, grouped by label values. Safe to use from any thread.

    Each combination of label values has its own buckets. At most `limit` combinations are kept; all others are counted
    together under the label value `other`.
    """

    def __init__(self, bounds: Sequence[float] = SECONDS, limit: int = 1000) -> None:
        self._bounds, self._limit = tuple(bounds), limit
        self._lock = threading.Lock()
        self._sums: defaultdict[tuple[str, ...], list[Any]] = defaultdict(lambda: [0] * (len(bounds) + 2))

    def observe(self, value: float, labels: tuple[str, ...] = ()) -> None:
        """Add one value to the histogram."""
        at = bisect.bisect_left(self._bounds, value)
        with self._lock:
            if labels not in self._sums and len(self._sums) >= self._limit:
                labels = (OTHER,) * len(labels)
            sums = self._sums[labels]  # the count for each bucket, and the total
            sums[at] += 1
            sums[-1] += value

    def read(self) -> dict[tuple[str, ...], Observed]:
        """Return the observations so far, keyed by label values."""
        with self._lock:
            return {labels: Observed(self._bounds, tuple(sums[:-1]), sums[-1]) for labels, sums in self._sums.items()}
