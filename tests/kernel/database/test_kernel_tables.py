"""The kernel's own migration makes the tables that its models describe."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from playhouse.schema_diff import diff_models

from corral.database.leases import Lease
from corral.events.consumers import ConsumerRow
from corral.events.log import EventRow
from corral.http.idempotency import IdempotencyRow
from corral.jobs.job import JobRow, ScheduleRow
from corral.testing.kit import Kit

TABLES = [EventRow, ConsumerRow, JobRow, ScheduleRow, Lease, IdempotencyRow]


async def test_models_and_migration_agree(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=[])
    database = kit.kernel.database
    assert await database.work(lambda: str(diff_models(database.engine, TABLES)), read=True) == ""
