"""Marks of tests that are about one engine."""

from __future__ import annotations

import pytest

SQLITE, POSTGRES = (
    pytest.mark.parametrize(
        "unmade_database_url", [pytest.param(name, marks=getattr(pytest.mark, name))], indirect=True
    )
    for name in ("sqlite", "postgres")
)
