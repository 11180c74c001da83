"""The manifest and the hook implementations of the `redis` plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from corral.events.live_feed import Bus
from corral.jobs.shared_queue import SharedJobQueue
from corral.plugin import HealthCheck, Plugin, Provide, hookimpl
from corral_core.redis.api import SharedBuckets
from corral_core.redis.service.buckets import RedisBuckets
from corral_core.redis.service.bus import RedisBus
from corral_core.redis.service.queue import RqQueue

SCHEMES = ("redis://", "rediss://", "unix://")


class RedisPlugin(Plugin):
    """Redis: notifies other processes, distributes jobs and shares rate limits if `[redis] url` is set."""

    name = "redis"
    protected = True  # if `[redis] url` is set, the kernel refuses to start without this plugin, in safe mode too

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._bus: RedisBus | None = None

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(SharedBuckets, RedisBuckets)]

    @hookimpl
    def corral_bus(self, url: str) -> Bus | None:
        self._bus = RedisBus(url) if url.startswith(SCHEMES) else None
        return self._bus

    @hookimpl
    def corral_job_queue(self, url: str) -> SharedJobQueue | None:
        return RqQueue(url) if url.startswith(SCHEMES) else None

    @hookimpl
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("redis", self._check_connection)]

    def _check_connection(self) -> tuple[str, str]:
        return ("disabled", "Redis is not configured.") if self._bus is None else self._bus.health()
