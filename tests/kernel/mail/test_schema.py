"""The migrations make the tables that the models describe."""

from __future__ import annotations

from playhouse.schema_diff import diff_models

from corral.testing.kit import Kit
from corral_core.accounts.models import InvitationRow, LinkRow, UserRow


async def test_models_and_migration_agree(mailing: Kit) -> None:
    database = mailing.kernel.database
    tables = [LinkRow, InvitationRow, UserRow]
    assert await database.work(lambda: str(diff_models(database.engine, tables))) == ""
