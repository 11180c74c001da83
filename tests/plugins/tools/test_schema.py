"""The migration creates the tables that the models describe."""

from __future__ import annotations

from playhouse.schema_diff import diff_models

from corral.testing.kit import Kit


async def test_models_and_migration_agree(kit: Kit) -> None:
    models = kit.loaded("tools").contributions_to("corral_models")

    def differences() -> str:
        return str(diff_models(kit.kernel.database.engine, models))

    assert await kit.kernel.database.work(differences) == ""
