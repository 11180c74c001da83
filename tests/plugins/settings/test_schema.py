"""The migration makes the tables that the models describe."""

from __future__ import annotations

from playhouse.schema_diff import diff_models
from tests.plugins.settings.conftest import Shelf

from corral_plugins.settings.models import TABLES


async def test_models_and_migration_agree(shelf: Shelf) -> None:
    database = shelf.kit.kernel.database
    assert await database.work(lambda: str(diff_models(database.engine, TABLES))) == ""
