"""The fixtures and hooks of the product's tests, with which the tests of all these plugins start servers as forks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from tests.conftest import (
    _hashes_are_cheap,
    _servers_are_forked,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
)

__all__ = [
    "_hashes_are_cheap",
    "_servers_are_forked",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
]
