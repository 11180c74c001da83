"""The migration makes the table that the model describes."""

from __future__ import annotations

from playhouse.schema_diff import diff_models

from corral.testing.kit import Kit
from corral_plugins.admin.models import KillSwitchRow


async def test_models_and_migration_agree(kit: Kit) -> None:
    database = kit.kernel.database
    assert await database.work(lambda: str(diff_models(database.engine, [KillSwitchRow]))) == ""
