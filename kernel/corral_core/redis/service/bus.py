"""Wake-up notifications through Redis pub/sub.

Notifications can be lost. Consumers therefore also poll the event log, so they receive all events without Redis too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from corral.ids import new_id
from corral_core.redis.service.connection import ReconnectBackoff, connect_async

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("corral.redis")

CHANNEL = "corral:events"
LISTEN_SECONDS, PATIENCE = 2.0, 3
RECONNECTING_SECONDS, CONNECTING_SECONDS = 60.0, 2.0  # how long the health check stays `degraded`


class RedisBus:
    """Notifies event consumers, directly in this process and through Redis pub/sub in other processes.

    Notifications in quick succession are combined. `connected` is true if this process receives notifications.
    `lost_at` is the monotonic time at which the connection was lost, or None.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = new_id().encode()  # Redis also delivers the notifications of this process, which are ignored
        self._wake: Callable[[], None] = lambda: None
        self._rung = asyncio.Event()
        self._client: Redis | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False  # needed because the Redis client may suppress the cancellation of a task
        self.connected = False
        self.lost_at: float | None = None
        self._began, self._was_connected = time.monotonic(), False

    def health(self) -> tuple[str, str]:
        """Return the state of the connection for `/settings/health`: a status and a sentence that explains it."""
        if self.connected:
            return "ok", "Redis responds."
        since = time.monotonic() - (self.lost_at or self._began)
        if since < (RECONNECTING_SECONDS if self._was_connected else CONNECTING_SECONDS):
            return "degraded", (
                "The connection to Redis is being opened. Until then, processes poll the database for events and jobs."
            )
        return "down", "Redis cannot be reached. Processes poll the database for events and jobs."

    def notify(self) -> None:
        self._wake()
        self._rung.set()

    async def start(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._client = await asyncio.to_thread(connect_async, self._url)  # the import takes a quarter of a second
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._publish()), loop.create_task(self._follow())]

    async def stop(self) -> None:
        self._wake = lambda: None
        self._stopped = True
        self._rung.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            with contextlib.suppress(Exception):
                await self._client.aclose()

    async def _publish(self) -> None:
        """Publish notifications one at a time. While disconnected, drop them; `_follow` restores the connection."""
        assert self._client is not None
        while not self._stopped:
            await self._rung.wait()
            self._rung.clear()
            if self.connected:
                try:
                    await self._client.publish(CHANNEL, self._name)
                except Exception as error:
                    log.debug("a notification could not be sent through Redis", extra={"reason": str(error)})

    async def _follow(self) -> None:
        """Receive notifications until stopped. If the connection is lost, reconnect with backoff."""
        pauses = ReconnectBackoff()
        while not self._stopped:
            try:
                await self._listen(pauses)
            except Exception as error:
                if self.lost_at is None and not self._stopped:
                    self.lost_at = time.monotonic()
                    log.warning(
                        "connection to Redis lost; polling the database for events", extra={"reason": str(error)}
                    )
                self.connected = False
            if not self._stopped:
                await asyncio.sleep(pauses.next_pause())

    async def _listen(self, pauses: ReconnectBackoff) -> None:
        assert self._client is not None
        unanswered = 0
        async with self._client.pubsub() as subscription:
            await subscription.subscribe(CHANNEL)
            while unanswered < PATIENCE and not self._stopped:
                message = await subscription.get_message(timeout=LISTEN_SECONDS)
                if message is None:
                    unanswered += 1
                    await subscription.ping()
                    continue
                unanswered = 0
                if message["type"] == "subscribe":
                    log.info("connected to Redis")
                    self.connected, self.lost_at, self._was_connected = True, None, True
                    pauses.reset()
                    self._wake()  # while disconnected, this process may have missed notifications
                elif message["type"] == "message" and message["data"] != self._name:
                    self._wake()
        raise TimeoutError("Redis did not respond")
