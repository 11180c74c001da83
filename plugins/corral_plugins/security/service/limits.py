"""What each caller may ask for in a time, and at once: counted in memory, so that no request waits for others."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import math
from collections import Counter

from corral.auth.principal import Principal
from corral.errors import TooMany
from corral.http.routes import Rate, Route
from corral.plugin import Quota, Settings
from corral_core.redis.api import SharedBuckets
from corral_plugins.security.service.buckets import Buckets, Full
from corral_plugins.security.service.uses import KeyUses
from corral_plugins.security.settings import ANONYMOUS_RATE, IN_FLIGHT, MACHINE_RATE, RATE

ADJUST_EVERY = 1.0
SHARE_PAUSE = 0.02  # what several calls did is told together
AT_ONCE = 1000
PEOPLE = ("user", "api_key")
IN_FLIGHT_NAME = "in_flight"
GENERAL = {
    "people": (Rate("people", 1200, 60), RATE),
    "machines": (Rate("machines", 12_000, 60), MACHINE_RATE),
    "anonymous": (Rate("anonymous", 120, 60, "client"), ANONYMOUS_RATE),
}


class Limits:
    """Implements `Meter` and `RateLimits`; lives on the loop. Until `start` everything passes."""

    def __init__(self) -> None:
        self.limited: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        self.names = [IN_FLIGHT_NAME]
        """Of the limits that may refuse."""
        self._on = False
        self._settings: Settings | None = None
        self._shared: SharedBuckets | None = None
        self._uses: KeyUses | None = None
        self._in_flight: dict[str, int] = {}
        self._at_once = 60
        self._processes = 1
        self._buckets: dict[str, Buckets] = {}
        self._people, self._machines, self._anonymous = [self._of(rate) for rate, _ in GENERAL.values()]
        self._told = asyncio.Event()

    def start(self, settings: Settings, shared: SharedBuckets, uses: KeyUses, *, on: bool, processes: int) -> None:
        """Count from now on, unless limits are off."""
        self._on, self._settings, self._shared, self._uses, self._processes = on, settings, shared, uses, processes
        if on and shared.is_configured:
            for buckets in self._buckets.values():
                buckets.unshared = {}
        self.adjust()

    # -- what the request path calls

    def arrive(self, client_ip: str, route: Route | None, *, anonymous: bool) -> Quota | None:
        if not self._on or (route is not None and route.exempt_host):
            return None
        own = route.rate if route is not None and route.rate is not None and route.rate.per == "client" else None
        if not anonymous and own is None:
            return None
        key = address_key(client_ip)
        found = self._take(self._anonymous, key) if anonymous else None
        if own is None:
            return found
        return tighter(self._take(self._of(own), key), found)

    def enter(self, caller: Principal, route: Route, client_ip: str) -> Quota | None:
        if caller.kind == "api_key":
            self.keys["ok"] += 1
            if self._uses is not None:
                self._uses.note(caller.id, client_ip)
        if not self._on:
            return None
        key = caller.task_id or caller.id
        count = self._in_flight.get(key, 0)
        if count >= self._at_once:
            self.limited[IN_FLIGHT_NAME] += 1
            detail = f"You have {count} requests in flight; wait for some to be answered."
            raise TooMany(detail, code="concurrency_limit")
        quota = self._take(self._people if caller.kind in PEOPLE else self._machines, key)
        own = route.rate
        if own is not None and own.per != "client":
            person = caller.user_id or caller.id
            quota = tighter(self._take(self._of(own), person if own.per == "person" else key), quota)
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
            self._take(self._of(rate), key)

    # -- keeping up

    def adjust(self) -> None:
        """Follow the settings, and how many processes share each figure."""
        assert self._settings is not None
        assert self._shared is not None
        share = 1 if self._shared.connected else max(self._processes, self._shared.processes)
        self._at_once = self._settings.get(IN_FLIGHT) or self._at_once
        counts = {rate.name: self._settings.get(setting) or rate.count for rate, setting in GENERAL.values()}
        for buckets in self._buckets.values():
            count = counts.get(buckets.rate.name, buckets.rate.count)
            if (buckets.count, buckets.share) != (count, share):
                buckets.adjust(count, share)

    async def follow(self) -> None:
        """Adjust for ever. Supervised."""
        while True:
            self.adjust()
            await asyncio.sleep(ADJUST_EVERY)

    async def share(self) -> None:
        """Tell the other processes what was counted here, and learn what they counted, for ever. Supervised."""
        assert self._shared is not None
        while True:
            try:
                async with asyncio.timeout(ADJUST_EVERY):
                    await self._told.wait()
            except TimeoutError:
                pass  # whoever counts nothing is still one of those who share
            self._told.clear()
            await self.exchange()
            await asyncio.sleep(SHARE_PAUSE)

    async def exchange(self) -> None:
        """Tell once. What cannot be told was counted here all the same."""
        assert self._shared is not None
        for part in self._parts():
            amounts = {f"{name}:{key}": self._buckets[name].seconds_of(calls) for (name, key), calls in part.items()}
            was = self._shared.connected
            answer = await self._shared.add(amounts)
            if was != self._shared.connected:
                self.adjust()
            for (name, key), filled in zip(part, (answer or {}).values(), strict=False):
                self._buckets[name].learn(key, filled)

    def _parts(self) -> list[dict[tuple[str, str], int]]:
        counted: dict[tuple[str, str], int] = {}
        for name, buckets in self._buckets.items():
            calls, buckets.unshared = buckets.unshared or {}, {}
            counted.update({(name, key): number for key, number in calls.items()})
        items = list(counted.items())
        return [dict(items[start : start + AT_ONCE]) for start in range(0, len(items), AT_ONCE)] or [{}]

    def _of(self, rate: Rate) -> Buckets:
        found = self._buckets.get(rate.name)
        if found is None:
            found = self._buckets[rate.name] = Buckets(rate)
            self.names.append(rate.name)
            if self._shared is not None:
                found.unshared = {} if self._shared.is_configured else None
                self.adjust()
        return found

    def _take(self, buckets: Buckets, key: str) -> Quota:
        try:
            quota = buckets.take(key)
        except Full as full:
            raise self._refused(buckets, full) from None
        if buckets.unshared is not None:
            self._told.set()
        return quota

    def _refused(self, buckets: Buckets, full: Full) -> TooMany:
        self.limited[buckets.rate.name] += 1
        wait = max(1, math.ceil(full.seconds))
        problem = TooMany(f"That is more than {full.limit} in {buckets.rate.seconds} seconds.", retry_after=wait)
        problem.headers.update(
            {
                "RateLimit-Limit": str(full.limit),
                "RateLimit-Remaining": "0",
                "RateLimit-Reset": str(math.ceil(full.reset)),
            }
        )
        return problem


def tighter(one: Quota, other: Quota | None) -> Quota:
    """The one of which less is left."""
    return one if other is None or one.remaining <= other.remaining else other


@functools.lru_cache(maxsize=8192)
def address_key(client_ip: str) -> str:
    """Who counts as one client: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in client_ip:
        return client_ip
    return str(ipaddress.ip_network(f"{client_ip}/64", strict=False).network_address)
