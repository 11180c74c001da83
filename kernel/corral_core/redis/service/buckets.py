"""Rate-limit buckets shared through Redis.

Each process counts requests in memory and updates Redis in the background, so no request waits for Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from corral.ids import new_id
from corral.plugin import InstallationConfig
from corral_core.redis.service.connection import ReconnectBackoff, connect_async

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("corral.redis")

PATIENCE_SECONDS = 0.05  # while Redis responds more slowly than this, each process counts alone
MEMBER_SECONDS = 10
MEMBERS = "corral:buckets:processes"
PREFIX = "corral:bucket:"
# All processes use the clock of the Redis server. The value of a bucket is the instant at which it will be empty.
SCRIPT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
if ARGV[1] ~= '' then redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local answer = {tostring(redis.call('ZCARD', KEYS[1]))}
for i = 2, #KEYS do
  local empty = math.max(tonumber(redis.call('GET', KEYS[i]) or '0'), now) + tonumber(ARGV[i + 1])
  redis.call('SET', KEYS[i], string.format('%.6f', empty), 'PX', math.ceil((empty - now) * 1000) + 1)
  answer[i] = string.format('%.6f', empty - now)
end
return answer
"""


class RedisBuckets:
    """Rate-limit buckets in Redis, shared by all processes. Implements `corral_core.redis.api.SharedBuckets`."""

    def __init__(self, installation: InstallationConfig) -> None:
        self._url = installation.redis_url
        self._name, self._counts = new_id(), False
        self._client: Redis | None = None
        self._pauses = ReconnectBackoff()
        self._again_at = 0.0
        self.connected = False
        self.processes = installation.processes
        self._least = installation.processes

    @property
    def is_configured(self) -> bool:
        return self._url is not None

    async def add(self, seconds: Mapping[str, float]) -> Mapping[str, float] | None:
        if self._url is None or time.monotonic() < self._again_at:
            return None
        asking = asyncio.ensure_future(self._add_on_connection(self._url, seconds))
        try:
            done, _ = await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
            if not done and self.connected:
                self.connected = False
            answer = await asking  # the Redis client has its own timeout
        except asyncio.CancelledError:
            asking.cancel()
            raise
        except Exception as error:
            log.debug("each process counts rate limits by itself", extra={"reason": str(error)})
            self.connected, self._again_at = False, time.monotonic() + self._pauses.next_pause()
            return None
        self._pauses.reset()
        self.connected = bool(done)
        self.processes = max(self._least, int(answer[0]))
        return dict(zip(seconds, map(float, answer[1:]), strict=True))

    async def close(self) -> None:
        self.connected = False
        if self._client is not None:
            with contextlib.suppress(Exception):
                await self._client.zrem(MEMBERS, self._name)
            with contextlib.suppress(Exception):
                await self._client.aclose()
            self._client = None

    async def _add_on_connection(self, url: str, seconds: Mapping[str, float]) -> list[bytes]:
        if self._client is None:
            self._client = await asyncio.to_thread(connect_async, url)  # the import takes a quarter of a second
        self._counts = self._counts or bool(seconds)
        member = self._name if self._counts else ""  # a process that received no requests gets no share of the limits
        keys = [MEMBERS, *(PREFIX + key for key in seconds)]
        amounts = [f"{amount:.6f}" for amount in seconds.values()]
        answer: list[bytes] = await self._client.eval(SCRIPT, len(keys), *keys, member, str(MEMBER_SECONDS), *amounts)
        return answer
