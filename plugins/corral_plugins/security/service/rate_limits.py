"""Rate limits and the concurrency limit.

Requests are counted in memory, so that no request waits for another process. Each request adds to a bucket, which
drains over time. A bucket is stored as the time at which it will be empty. A time in the past means that the bucket is
empty, so empty buckets need not be deleted individually. Buckets are kept in two generations. After the time in which a
full bucket drains, or earlier if the current generation contains `MAX_KEYS` buckets, a new generation begins and the
oldest one is dropped as a whole.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable

from corral.auth.principal import Principal
from corral.errors import TooMany
from corral.http.client_address import address_key
from corral.http.routes import Rate, Route
from corral.plugin import RateLimitQuota, Settings
from corral_core.redis.api import SharedBuckets
from corral_plugins.security.service.api_keys import LastUseRecorder
from corral_plugins.security.settings import ANONYMOUS_RATE, IN_FLIGHT, MACHINE_RATE, RATE

MAX_KEYS = 100_000  # buckets per generation: a client with many addresses must not exhaust the memory
ROUNDING = 1e-6


class BucketFull(Exception):
    """Raised if a bucket is full. The bucket accepts another request after `seconds` seconds."""

    def __init__(self, limit: int, seconds: float, reset: float) -> None:
        self.limit, self.seconds, self.reset = limit, seconds, reset
        super().__init__()


class TokenBuckets:
    """The buckets of one rate limit. Use this class only on the event loop.

    `share` is the number of processes among which the limit is divided equally, or 1 while the processes share their
    counts. `unshared` maps each key to the number of requests that `RequestLimits` has not yet sent to the other
    processes, or is None if the counts are never shared.
    """

    def __init__(self, rate: Rate, *, now: Callable[[], float] = time.monotonic) -> None:
        self.unshared: dict[str, int] | None = None
        self._now = now
        self._recent: dict[str, float] = {}
        self._older: dict[str, float] = {}
        self._rotates_at = 0.0
        self.rate = rate
        self.set_limit(rate.count, 1)

    def set_limit(self, count: int, share: int) -> None:
        """Allow `count` requests per period in all `share` processes together.

        This process allows an equal fraction of the requests, but at least one.
        """
        self.count, self.share = count, share
        self._interval = self.rate.seconds * share / count
        self._window = max(float(self.rate.seconds), self._interval)
        self._limit = max(1, count // share)

    def take_token(self, key: str) -> RateLimitQuota:
        """Count one request and return the remaining quota.

        Raise `BucketFull` if the bucket has no room for the request.
        """
        now = self._now()
        if now >= self._rotates_at or len(self._recent) >= MAX_KEYS:
            self._rotate_generations(now)
        empty = self._recent.get(key)
        if empty is None:
            empty = self._older.get(key, 0.0)
        ahead = (empty - now if empty > now else 0.0) + self._interval
        left = self._window - ahead + ROUNDING
        if left < 0:
            raise BucketFull(self._limit, -left, ahead - self._interval)
        self._recent[key] = now + ahead
        if self.unshared is not None:
            self.unshared[key] = self.unshared.get(key, 0) + 1
        return RateLimitQuota(self._limit, int(left / self._interval), math.ceil(ahead - ROUNDING))

    def apply_shared_level(self, key: str, ahead: float) -> None:
        """Apply the fill level of a bucket, in seconds, as received from the other processes.

        Requests that this process has counted but not yet sent to the other processes are added to the level.
        """
        more = (self.unshared or {}).get(key, 0) * self.rate.seconds / self.count
        empty = self._now() + ahead + more
        known = self._recent.get(key)
        if known is None or known < empty:
            self._recent[key] = empty

    def request_cost_seconds(self, calls: int) -> float:
        """Return by how many seconds `calls` requests raise the fill level of a bucket that all processes share."""
        return calls * self.rate.seconds / self.count

    def _rotate_generations(self, now: float) -> None:
        self._older = self._recent if now < self._rotates_at + self._window else {}
        self._recent = {}
        self._rotates_at = now + self._window

    @property
    def bucket_count(self) -> int:
        """The number of buckets in memory."""
        return len(self._recent) + len(self._older)


# -- limits


ADJUST_EVERY = 1.0
SHARE_PAUSE = 0.02  # collects the counts of several requests into one exchange
BATCH_SIZE = 1000
PEOPLE = ("user", "api_key")
IN_FLIGHT_NAME = "in_flight"
GENERAL = {
    "people": (Rate("people", 1200, 60), RATE),
    "machines": (Rate("machines", 12_000, 60), MACHINE_RATE),
    "anonymous": (Rate("anonymous", 120, 60, "client"), ANONYMOUS_RATE),
}


class RequestLimits:
    """Limits the rate and the number of concurrent requests. Implements `RateLimiter` and `RateLimits`.

    This class runs on the event loop. Before `start` is called, every request passes.
    """

    def __init__(self) -> None:
        self.limited: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        self.names = [IN_FLIGHT_NAME]
        """The names of the limits that can reject a request, which are the label values of the metric."""
        self.now: Callable[[], float] = time.monotonic
        """The clock of all buckets. Tests can replace it."""
        self._on = False
        self._settings: Settings | None = None
        self._shared: SharedBuckets | None = None
        self._last_used: LastUseRecorder | None = None
        self._in_flight: dict[str, int] = {}
        self._at_once = 60
        self._processes = 1
        self._buckets: dict[str, TokenBuckets] = {}
        self._people, self._machines, self._anonymous = [self._buckets_of(rate) for rate, _ in GENERAL.values()]
        self._counted = asyncio.Event()

    def start(
        self, settings: Settings, shared: SharedBuckets, last_used: LastUseRecorder, *, on: bool, processes: int
    ) -> None:
        """Start counting requests. If `on` is false, rate limits stay off."""
        self._on, self._settings, self._shared = on, settings, shared
        self._last_used, self._processes = last_used, processes
        if on and shared.is_configured:
            for buckets in self._buckets.values():
                buckets.unshared = {}
        self.apply_settings()

    # -- called by the request pipeline

    def arrive(self, client_ip: str, route: Route | None, *, anonymous: bool) -> RateLimitQuota | None:
        if not self._on or (route is not None and route.exempt_host):
            return None
        own = route.rate if route is not None and route.rate is not None and route.rate.per == "client" else None
        has_own_key = route is not None and route.rate is not None and route.rate.per == "key"
        if (not anonymous and own is None) or has_own_key:
            return None
        key = address_key(client_ip)
        found = self._take_token(self._anonymous, key) if anonymous else None
        if own is None:
            return found
        return tighter_quota(self._take_token(self._buckets_of(own), key), found)

    def enter(self, caller: Principal, route: Route, client_ip: str) -> RateLimitQuota | None:
        if caller.kind == "api_key":
            self.keys["ok"] += 1
            if self._last_used is not None:
                self._last_used.record_use(caller.id, client_ip)
        if not self._on:
            return None
        key = caller.task_id or caller.id
        count = self._in_flight.get(key, 0)
        if count >= self._at_once:
            self.limited[IN_FLIGHT_NAME] += 1
            detail = f"You already have {count} requests in progress; wait until some of them finish."
            raise TooMany(detail, code="concurrency_limit")
        quota = self._take_token(self._people if caller.kind in PEOPLE else self._machines, key)
        own = route.rate
        if own is not None and own.per not in ("client", "key"):
            person = caller.user_id or caller.id
            quota = tighter_quota(
                self._take_token(self._buckets_of(own), person if own.per == "person" else key), quota
            )
        self._in_flight[key] = count + 1
        return quota

    def leave(self, caller: Principal) -> None:
        key = caller.task_id or caller.id
        left = self._in_flight.get(key, 0) - 1
        if left > 0:
            self._in_flight[key] = left
        else:
            self._in_flight.pop(key, None)

    def take(self, rate: Rate, key: str) -> None:
        if self._on:
            self._take_token(self._buckets_of(rate), key)

    # -- background tasks

    def apply_settings(self) -> None:
        """Apply the current settings, and the number of processes among which the limits are divided."""
        assert self._settings is not None
        assert self._shared is not None
        share = 1 if self._shared.connected else max(self._processes, self._shared.processes)
        self._at_once = self._settings.get(IN_FLIGHT) or self._at_once
        counts = {rate.name: self._settings.get(setting) or rate.count for rate, setting in GENERAL.values()}
        for buckets in self._buckets.values():
            count = counts.get(buckets.rate.name, buckets.rate.count)
            if (buckets.count, buckets.share) != (count, share):
                buckets.set_limit(count, share)

    async def apply_settings_regularly(self) -> None:
        """Apply changed settings once a second. Runs as a supervised task."""
        while True:
            self.apply_settings()
            await asyncio.sleep(ADJUST_EVERY)

    async def exchange_counts_regularly(self) -> None:
        """Exchange request counts with the other processes. Runs as a supervised task."""
        assert self._shared is not None
        while True:
            try:
                async with asyncio.timeout(ADJUST_EVERY):
                    await self._counted.wait()
            except TimeoutError:
                pass  # an idle process still reports, because it counts as one of the processes that share the limits
            self._counted.clear()
            await self.exchange_counts()
            await asyncio.sleep(SHARE_PAUSE)

    async def exchange_counts(self) -> None:
        """Send this process's request counts once, and receive the totals of all processes.

        Counts that cannot be sent still count towards the limits in this process.
        """
        assert self._shared is not None
        for part in self._count_batches():
            amounts = {
                f"{name}:{key}": self._buckets[name].request_cost_seconds(calls) for (name, key), calls in part.items()
            }
            was = self._shared.connected
            answer = await self._shared.add(amounts)
            if was != self._shared.connected:
                self.apply_settings()
            for (name, key), filled in zip(part, (answer or {}).values(), strict=False):
                self._buckets[name].apply_shared_level(key, filled)

    def _count_batches(self) -> list[dict[tuple[str, str], int]]:
        counted: dict[tuple[str, str], int] = {}
        for name, buckets in self._buckets.items():
            calls, buckets.unshared = buckets.unshared or {}, {}
            counted.update({(name, key): number for key, number in calls.items()})
        items = list(counted.items())
        return [dict(items[start : start + BATCH_SIZE]) for start in range(0, len(items), BATCH_SIZE)] or [{}]

    def _buckets_of(self, rate: Rate) -> TokenBuckets:
        found = self._buckets.get(rate.name)
        if found is None:
            found = self._buckets[rate.name] = TokenBuckets(rate, now=lambda: self.now())
            self.names.append(rate.name)
            if self._shared is not None:
                found.unshared = {} if self._shared.is_configured else None
                self.apply_settings()
        return found

    def _take_token(self, buckets: TokenBuckets, key: str) -> RateLimitQuota:
        try:
            quota = buckets.take_token(key)
        except BucketFull as full:
            raise self._limit_exceeded_error(buckets, full) from None
        if buckets.unshared is not None:
            self._counted.set()
        return quota

    def _limit_exceeded_error(self, buckets: TokenBuckets, full: BucketFull) -> TooMany:
        self.limited[buckets.rate.name] += 1
        wait = max(1, math.ceil(full.seconds))
        problem = TooMany(
            f"The limit is {full.limit} requests in {buckets.rate.seconds} seconds; wait before the next one.",
            retry_after=wait,
        )
        problem.headers.update(
            {
                "RateLimit-Limit": str(full.limit),
                "RateLimit-Remaining": "0",
                "RateLimit-Reset": str(math.ceil(full.reset)),
            }
        )
        return problem


def tighter_quota(one: RateLimitQuota, other: RateLimitQuota | None) -> RateLimitQuota:
    """Return the quota with fewer remaining requests."""
    return one if other is None or one.remaining <= other.remaining else other
