"""Migrating an empty database creates exactly the tables of the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playhouse.schema_diff import diff_models

from corral.database.unit import current
from corral_plugins.llm.models import TABLES


async def test_the_migration_matches_the_models(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=["cost", "llm"])
    difference = await kit.kernel.database.work(lambda: diff_models(current().database.engine, list(TABLES)))
    assert not difference, difference
