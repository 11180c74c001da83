"""Heap trimming: returns memory to the operating system when requests no longer need it.

glibc keeps free pages that lie below memory still in use. In addition, closed connections form reference cycles that
keep the last received bytes in memory until the garbage collector runs. Without trimming, the process would never
release the memory used by large requests.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

LOOK_EVERY = 2.0
MUCH = 8 * 2**20  # bytes of growth; trimming takes some milliseconds, which less growth does not justify
SELDOM = 3  # the longest pause between two runs, in intervals of `LOOK_EVERY` seconds
STATM = Path("/proc/self/statm")


class HeapTrimming:
    """Trims the heap of this process in the background."""

    def __init__(self) -> None:
        self._trim = _malloc_trim()

    async def trim_regularly(self) -> None:
        """Trim the heap until cancelled: soon after it has grown, and then at increasing intervals.

        The kernel supervises this task.
        """
        if self._trim is None:  # only glibc has malloc_trim
            await asyncio.get_running_loop().create_future()
            return
        after, wait, left = 0, 1, 1
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if resident_bytes() > after + MUCH:
                wait = left = 1
            left -= 1
            if left == 0:
                gc.collect(1)  # only the young generations; on the event loop, like every garbage collection
                await asyncio.to_thread(self._trim, 0)
                after = resident_bytes()
                wait = left = min(2 * wait, SELDOM)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
