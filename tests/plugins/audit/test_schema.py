"""The migration makes the tables that the models describe, and triggers that keep what is written."""

from __future__ import annotations

from typing import Any

import peewee
import pytest
from playhouse.schema_diff import diff_models

from corral_plugins.audit.models import TABLES, AuditRow, CheckpointRow


async def test_models_and_migration_agree(books: Any) -> None:
    engine = books.kit.kernel.database.engine
    assert await books.work(lambda: str(diff_models(engine, TABLES))) == ""


async def test_no_row_can_be_changed_or_deleted(books: Any) -> None:
    await books.write(3)
    await books.sign()
    for attempt in (
        lambda: AuditRow.update(outcome="success").execute(),
        lambda: AuditRow.delete().where(AuditRow.seq == 1).execute(),
        lambda: CheckpointRow.update(rows=1).execute(),
        lambda: CheckpointRow.delete().execute(),
    ):
        with pytest.raises(peewee.DatabaseError, match=r"cannot be changed|cannot be deleted"):
            await books.work(attempt)
    if books.kit.kernel.database.kind == "sqlite":  # PostgreSQL has nothing like it that passes the other triggers
        for table, chosen in (("audit_rows", "seq = 1"), ("audit_checkpoints", "TRUE")):
            replace = f"INSERT OR REPLACE INTO {table} SELECT * FROM {table} WHERE {chosen}"
            with pytest.raises(peewee.DatabaseError, match="cannot be changed"):
                await books.work(lambda sql=replace: books.kit.kernel.database.engine.execute_sql(sql))
    assert (await books.verify()).ok
