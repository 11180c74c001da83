"""Memory that was used once goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio
from corral_core.health.service import heap_trimming
heap_trimming.LOOK_EVERY = 0.05

class Cycle:
    def __init__(self, size):
        self.body, self.me = bytes(size), self

async def main():
    following = asyncio.create_task(heap_trimming.HeapTrimming().trim_regularly())
    await asyncio.sleep(0.2)
    before = heap_trimming.resident_bytes()
    bodies = [Cycle(20_000) for _ in range(3_000)]
    kept = bytes(20_000)  # lies above them
    used = heap_trimming.resident_bytes()
    del bodies
    for _ in range(600):
        await asyncio.sleep(0.05)
        if heap_trimming.resident_bytes() - before < (used - before) / 4:
            break
    print(used - before, heap_trimming.resident_bytes() - before, len(kept))
    following.cancel()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked")
def test_what_large_bodies_took_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    used, left, _ = map(int, done.stdout.split())
    assert used > 40 * 2**20
    assert left < used / 4
