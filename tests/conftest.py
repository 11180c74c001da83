"""For the whole suite: less time for collecting garbage and for disks, and the order of the tests."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

import pytest

MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30

# Mostly waiting, for servers and for what happens in time: done beside those that compute, instead of after them.
FIRST = ("tests/benchmarks/", "tests/promises/", "tests/end_to_end/")


def pytest_configure() -> None:
    """Garbage as `corral` does it. Folders of tests in memory, as the tests' PostgreSQL is, where there is room: that
    what is written outlives a power cut is tested nowhere.
    """
    gc.set_threshold(20_000, 20, 20)
    with suppress(OSError):
        found = os.statvfs(MEMORY)
        if found.f_bavail * found.f_frsize >= ROOM and not found.f_flag & getattr(os, "ST_NOEXEC", 0):
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the PostgreSQL run of `one_engine` tests unless `--long` is given, and put the tests that wait first.

    With `--dist worksteal` one process starts on the first third, and the others take over what is left at the end.
    """
    if not config.getoption("--long"):
        twice = [
            item for item in items if item.get_closest_marker("one_engine") and item.get_closest_marker("postgres")
        ]
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if item not in {*twice}]
    items.sort(key=lambda item: next((n for n, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """All modules and items are here to stay: no collection looks through them again."""
    gc.collect()
    gc.freeze()
