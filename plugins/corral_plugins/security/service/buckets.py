"""Token buckets of one rate, in memory.

A bucket is the instant at which it will be empty again, so it needs no sweep: one that lies in the past is empty. Two
generations of a window each, or of so many keys, hold them; the older one is dropped as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from corral.http.routes import Rate
from corral.plugin import Quota

MOST = 100_000  # keys of a generation: who commands many addresses must not fill the memory
ROUNDING = 1e-6


class Full(Exception):
    """The bucket is full; in `seconds` there is room for one more."""

    def __init__(self, limit: int, seconds: float, reset: float) -> None:
        self.limit, self.seconds, self.reset = limit, seconds, reset
        super().__init__()


class Buckets:
    """Lives on the loop. `share`: how many processes share the rate, each of which counts alone.

    With `unshared`, what was counted is noted there by key until somebody takes it.
    """

    def __init__(self, rate: Rate, *, now: Callable[[], float] = time.monotonic) -> None:
        self.unshared: dict[str, int] | None = None
        self._now = now
        self._recent: dict[str, float] = {}
        self._older: dict[str, float] = {}
        self._turns_at = 0.0
        self.rate = rate
        self.adjust(rate.count, 1)

    def adjust(self, count: int, share: int) -> None:
        """Let `count` calls pass in the rate's time, of which this process has its share, but one at least."""
        self.count, self.share = count, share
        self._interval = self.rate.seconds * share / count
        self._window = max(float(self.rate.seconds), self._interval)
        self._limit = max(1, count // share)

    def take(self, key: str) -> Quota:
        """Count one; raises `Full`."""
        now = self._now()
        if now >= self._turns_at or len(self._recent) >= MOST:
            self._turn(now)
        empty = self._recent.get(key)
        if empty is None:
            empty = self._older.get(key, 0.0)
        ahead = (empty - now if empty > now else 0.0) + self._interval
        left = self._window - ahead + ROUNDING
        if left < 0:
            raise Full(self._limit, -left, ahead - self._interval)
        self._recent[key] = now + ahead
        if self.unshared is not None:
            self.unshared[key] = self.unshared.get(key, 0) + 1
        return Quota(self._limit, int(left / self._interval), math.ceil(ahead - ROUNDING))

    def learn(self, key: str, ahead: float) -> None:
        """The others' calls and ours fill this bucket for so long; what is not shared yet comes on top."""
        more = (self.unshared or {}).get(key, 0) * self.rate.seconds / self.count
        empty = self._now() + ahead + more
        known = self._recent.get(key)
        if known is None or known < empty:
            self._recent[key] = empty

    def seconds_of(self, calls: int) -> float:
        """By how much calls fill a bucket that all processes share."""
        return calls * self.rate.seconds / self.count

    def _turn(self, now: float) -> None:
        self._older = self._recent if now < self._turns_at + self._window else {}
        self._recent = {}
        self._turns_at = now + self._window

    @property
    def size(self) -> int:
        """Buckets that are held."""
        return len(self._recent) + len(self._older)
