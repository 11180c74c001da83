"""The migration creates the tables of the models."""

from __future__ import annotations

from typing import Any

from playhouse.schema_diff import diff_models

from corral_plugins.cost.models import TABLES


async def test_models_and_migration_agree(books: Any) -> None:
    engine = books.kit.kernel.database.engine
    assert await books.work(lambda: str(diff_models(engine, TABLES))) == ""
