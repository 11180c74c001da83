"""The migration makes the tables that the models describe."""

from __future__ import annotations

from playhouse.schema_diff import diff_models
from tests.plugins.marketplace.conftest import Market

from corral_plugins.marketplace.models import TABLES


async def test_models_and_migration_agree(market: Market) -> None:
    engine = market.kit.kernel.database.engine
    assert await market.kit.work(lambda: str(diff_models(engine, TABLES))) == ""
