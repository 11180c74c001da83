"""The server's own worker: one for all processes that share a database, in the one that holds its lease."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol

from corral.database.engine import Work
from corral.database.leases import acquire, holder_of, release
from corral.database.unit import Entry
from corral.errors import Unavailable
from corral.ids import new_id

LEASE, LEASE_SECONDS, RENEW_SECONDS = "workers.embedded", 15.0, 5.0
ENTRY = Entry("workers.embedded")


class Program(Protocol):
    """Runs the worker until it is cancelled."""

    async def run(self) -> None:
        """Restarts what ends."""
        ...


class EmbeddedLease:
    """Has `start()`'s program run while this process holds the lease."""

    def __init__(self, work: Work, start: Callable[[], Program]) -> None:
        self._work, self._start = work, start
        self._holder = f"{socket.gethostname()[:30]}|{os.getpid()}|{new_id()}"
        self._running: asyncio.Task[None] | None = None
        self._closed = False
        self._until = 0.0  # on the monotonic clock: no other process has the lease before

    async def run(self) -> None:
        """For ever; supervised by the kernel."""
        try:
            while True:
                held = not self._closed and await self._holds()
                if held and self._running is None:
                    self._running = asyncio.get_running_loop().create_task(self._start().run())
                elif not held or (self._running is not None and self._running.done()):
                    await self._end()
                await asyncio.sleep(RENEW_SECONDS)
        finally:
            await self._end()

    async def close(self) -> None:
        """End the program and let another process begin at once."""
        self._closed = True
        await self._end()
        await self._work(lambda: release(LEASE, self._holder), entry=ENTRY)

    async def _holds(self) -> bool:
        """Whether this process has the lease. A database that is away for a moment takes it from nobody."""
        asked = time.monotonic()
        try:
            held = await self._work(self._acquire, entry=ENTRY)
        except Unavailable:
            if self._running is None or asked >= self._until:
                raise
            return True
        self._until = asked + LEASE_SECONDS
        return held

    def _acquire(self) -> bool:
        """Take or renew the lease; one whose holder was killed on this machine is free at once."""
        before = holder_of(LEASE)
        if before is not None and before != self._holder and _is_dead(before):
            release(LEASE, before)
        return acquire(LEASE, self._holder, LEASE_SECONDS)

    async def _end(self) -> None:
        """A failure of the program is the supervisor's business: it logs it and begins again."""
        task, self._running = self._running, None
        if task is None:
            return
        if task.done():
            task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that no longer runs."""
    host, _, rest = holder.partition("|")
    pid = rest.partition("|")[0]
    if host != socket.gethostname()[:30] or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
