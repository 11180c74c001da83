"""Settings for the whole suite: garbage collection, temporary folders, generated cases, and the order of the tests."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

MEMORY, MEMORY_NEEDED = Path("/dev/shm"), 8 * 2**30

# These tests mostly wait for servers and timers, so they run beside the tests that compute, not after them.
FIRST = ("tests/benchmarks/", "tests/promises/", "tests/end_to_end/")


def pytest_configure() -> None:
    """Collect garbage as the server does, keep temporary folders in memory, and let generated cases take their time.

    No test checks that data outlives a power cut, so memory is as good as a disk. How long an example takes depends on
    the load of the machine and is no property of the code.
    """
    settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")
    gc.set_threshold(20_000, 20, 20)
    # Images of containers set this variable. Each server that a test starts would compile all modules again, for two
    # seconds of processor time.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    with suppress(OSError):
        found = os.statvfs(MEMORY)
        if found.f_bavail * found.f_frsize >= MEMORY_NEEDED and not found.f_flag & getattr(os, "ST_NOEXEC", 0):
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the PostgreSQL run of `one_engine` tests unless `--long` is given, and put the tests that wait first.

    With `--dist worksteal` one process starts on the first third, and the others take over what is left at the end.
    """
    if not config.getoption("--long", default=False):
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
