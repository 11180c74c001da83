"""Background work of tools."""

from __future__ import annotations

from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral.events.log import Record
from corral.jobs.job import Schedule, enqueue
from corral.plugin import Settings
from corral_plugins.tools.service import ledger
from corral_plugins.tools.service.records import Records
from corral_plugins.tools.settings import CALL_RETENTION_DAYS

AT_ONCE = 500
ROUNDS = 20


async def reap(work: Work, records: Records) -> None:
    """End calls that nobody will end any more."""
    for _ in range(ROUNDS):
        if await work(records.reap, entry=Entry(label="job tools.reap", actor=SYSTEM)) < ledger.AT_ONCE:
            return


async def prune(work: Work, settings: Settings) -> None:
    """Delete what is older than `tools.call_retention_days`."""
    days = settings.get(CALL_RETENTION_DAYS)
    while await work(lambda: ledger.delete_older(days, AT_ONCE), entry=Entry(label="job tools.prune", actor=SYSTEM)):
        continue


def forget_task(event: Record) -> None:
    """A deleted task's calls go with it, in chunks."""
    if ledger.delete_of(event.object_id, AT_ONCE) == AT_ONCE:
        enqueue("tools.forget_task", task_id=event.object_id)


def go_on_forgetting(task_id: str) -> None:
    """The rest of the calls of a deleted task."""
    if ledger.delete_of(task_id, AT_ONCE) == AT_ONCE:
        enqueue("tools.forget_task", task_id=task_id)


SCHEDULES = (Schedule("tools.reap", 15, reap), Schedule("tools.prune", 86_400, prune))
