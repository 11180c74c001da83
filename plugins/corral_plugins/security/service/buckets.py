"""Token buckets of one rate limit, in memory.

A bucket is stored as the instant at which it will be empty again. An instant in the past means an empty bucket, so
buckets need no cleanup. Buckets are stored in two generations, each limited to one window and to `MAX_KEYS`. The older
generation is dropped as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from corral.http.routes import Rate
from corral.plugin import Quota

MAX_KEYS = 100_000  # buckets per generation: a client with many addresses must not exhaust the memory
ROUNDING = 1e-6


class Full(Exception):
    """Raised if a bucket is full. The bucket accepts another request after `seconds`."""

    def __init__(self, limit: int, seconds: float, reset: float) -> None:
        self.limit, self.seconds, self.reset = limit, seconds, reset
        super().__init__()


class Buckets:
    """The buckets of one rate limit. Used on the event loop only.

    `share` is the number of processes that divide the limit among them and count separately. If `unshared` is a dict,
    it collects the counts by key until `Limits` sends them to the other processes.
    """

    def __init__(self, rate: Rate, *, now: Callable[[], float] = time.monotonic) -> None:
        self.unshared: dict[str, int] | None = None
        self._now = now
        self._recent: dict[str, float] = {}
        self._older: dict[str, float] = {}
        self._rotates_at = 0.0
        self.rate = rate
        self.adjust(rate.count, 1)

    def adjust(self, count: int, share: int) -> None:
        """Allow `count` requests per period of the rate, divided by `share`, but at least one."""
        self.count, self.share = count, share
        self._interval = self.rate.seconds * share / count
        self._window = max(float(self.rate.seconds), self._interval)
        self._limit = max(1, count // share)

    def take(self, key: str) -> Quota:
        """Count one request and return the remaining quota. Raises `Full`."""
        now = self._now()
        if now >= self._rotates_at or len(self._recent) >= MAX_KEYS:
            self._rotate(now)
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
        """Apply the fill level of a bucket, in seconds, received from the other processes.

        Counts that this process has not sent yet are added to the level.
        """
        more = (self.unshared or {}).get(key, 0) * self.rate.seconds / self.count
        empty = self._now() + ahead + more
        known = self._recent.get(key)
        if known is None or known < empty:
            self._recent[key] = empty

    def seconds_of(self, calls: int) -> float:
        """Return by how many seconds `calls` requests fill a bucket that all processes share."""
        return calls * self.rate.seconds / self.count

    def _rotate(self, now: float) -> None:
        self._older = self._recent if now < self._rotates_at + self._window else {}
        self._recent = {}
        self._rotates_at = now + self._window

    @property
    def size(self) -> int:
        """The number of buckets in memory."""
        return len(self._recent) + len(self._older)
