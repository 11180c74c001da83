"""The migration makes the tables that the models describe."""

from __future__ import annotations

from typing import Any

from playhouse.schema_diff import diff_models

from corral_plugins.secrets.models import TABLES


async def test_models_and_migration_agree(safe: Any) -> None:
    engine = safe.kit.kernel.database.engine
    assert await safe.work(lambda: str(diff_models(engine, TABLES))) == ""
