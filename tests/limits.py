"""Limits of time that a machine with other things to do does not exceed by itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest

from corral import clock
from corral.plugin import RateLimits
from corral.testing.kit import Kit

LOOK = 0.01


def stop_refilling(kit: Kit) -> None:
    """Let no time pass for the rate limits of a kernel: they give nothing back, however slow the machine is."""
    limits: Any = kit.service(RateLimits)
    now = limits.now()
    limits.now = lambda: now


class _StoppedTime:
    """The time as it was."""

    def __init__(self) -> None:
        self._time, self._monotonic = time.time(), time.monotonic()

    def time(self) -> float:
        return self._time

    def monotonic(self) -> float:
        return self._monotonic


def stop_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only `clock.travel` move the clock of this process, so that the time which a step takes does not count."""
    monkeypatch.setattr(clock, "time", _StoppedTime())


class Stopwatch:
    """Measures how long other processes take: `with Stopwatch() as watch:`, and `watch.seconds` at any moment.

    A thread looks again and again, and no look counts for more than a moment: while the machine stands still, no time
    passes here.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ends.wait(LOOK):
            now = time.monotonic()
            self.seconds += min(now - last, 2 * LOOK)
            last = now


@contextlib.asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, for what a page promises to happen within some seconds in the process of the test.

    It counts how often the event loop comes round. While the machine stands still or gives the process no core, no time
    passes here, so that a limit of one second can be judged on a machine that is busy for longer than that.
    """
    async with asyncio.timeout(None) as limit:

        async def count() -> None:
            for _ in range(round(seconds / LOOK)):
                await asyncio.sleep(LOOK)
            limit.reschedule(asyncio.get_running_loop().time())

        counting = asyncio.create_task(count())
        try:
            yield
        finally:
            counting.cancel()
