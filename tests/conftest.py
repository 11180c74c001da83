"""For the whole suite: less time for collecting garbage, of which there is little."""

from __future__ import annotations

import gc

import pytest


def pytest_configure() -> None:
    """As `corral` does it."""
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish(session: pytest.Session) -> None:
    """All modules and items are here to stay: no collection looks through them again."""
    gc.collect()
    gc.freeze()
