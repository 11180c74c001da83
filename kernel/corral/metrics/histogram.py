"""How long things took, counted in buckets as they happen: the figures behind a metric of the kind `histogram`."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from typing import NamedTuple

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LONG_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)


class Observed(NamedTuple):
    """`counts` by bucket, the last one for what is beyond all bounds, and the sum of the values."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    def plus(self, other: Observed) -> Observed:
        """Both together; of one histogram."""
        return Observed(
            self.bounds, [a + b for a, b in zip(self.counts, other.counts, strict=True)], self.total + other.total
        )


class Histogram:
    """Of this process since its start, by label values. Any thread may observe."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._totals: dict[tuple[str, ...], float] = {}

    def observe(self, value: float, labels: tuple[str, ...] = ()) -> None:
        """One value. Use few label values: each has its own buckets."""
        at = bisect.bisect_left(self._bounds, value)
        with self._lock:
            if labels not in self._counts:
                self._begin(labels)
            self._counts[labels][at] += 1
            self._totals[labels] += value

    def read(self) -> dict[tuple[str, ...], Observed]:
        """What was observed so far, by label values."""
        with self._lock:
            return {
                labels: Observed(self._bounds, tuple(counts), self._totals[labels])
                for labels, counts in self._counts.items()
            }

    def _begin(self, labels: tuple[str, ...]) -> None:
        self._counts[labels], self._totals[labels] = [0] * (len(self._bounds) + 1), 0.0
