"""The migration makes the tables that the models describe."""

from __future__ import annotations

from playhouse.schema_diff import diff_models

from corral.testing.kit import Kit
from corral_plugins.security.models import TABLES


async def test_models_and_migration_agree(kit: Kit) -> None:
    engine = kit.kernel.database.engine
    assert await kit.kernel.database.work(lambda: str(diff_models(engine, TABLES))) == ""
