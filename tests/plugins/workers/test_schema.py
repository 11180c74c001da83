"""The migration creates the tables that the models describe."""

from __future__ import annotations

from typing import Any

from playhouse.schema_diff import diff_models

from corral_plugins.workers.models import MODELS


async def test_models_and_migration_agree(fleet: Any) -> None:
    database = fleet.kit.kernel.database
    assert await database.work(lambda: str(diff_models(database.engine, MODELS))) == ""
