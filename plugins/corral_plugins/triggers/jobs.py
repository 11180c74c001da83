"""Background jobs of the `triggers` plugin."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.jobs.job import Job, Schedule
from corral.plugin import Settings
from corral_plugins.triggers.models import PENDING, Fire, Trigger
from corral_plugins.triggers.service.event_reader import TriggerLogReader
from corral_plugins.triggers.service.firing import TriggerFiring
from corral_plugins.triggers.service.rows import DAY
from corral_plugins.triggers.service.scheduler import TriggerScheduler
from corral_plugins.triggers.service.slots import FIRE_JOB
from corral_plugins.triggers.settings import HISTORY_DAYS

BATCH_SIZE = 500
LEASE_SECONDS = 60  # after a crash, the sweep fires the slots of the job much earlier


async def fire_slots(ids: list[str], firing: TriggerFiring) -> None:
    """Run the triggers' actions for pending slots. A slot is one occasion on which a trigger fires."""
    await firing.fire(ids)


async def read_events(reader: TriggerLogReader) -> None:
    """Read new events from the event log, and record slots for the triggers that listen for them."""
    await reader.handle_new_events()


async def record_due_slots(scheduler: TriggerScheduler) -> None:
    """Record slots for the triggers that are due. A slot is one occasion on which a trigger fires."""
    await scheduler.record_due_slots()


async def fire_waiting_slots(scheduler: TriggerScheduler) -> None:
    """Fire waiting slots whose delay has ended. A slot is one occasion on which a trigger fires."""
    await scheduler.fire_waiting_slots()


async def end_waits(scheduler: TriggerScheduler) -> None:
    """Record slots for absence triggers whose expected event did not arrive in time."""
    await scheduler.end_waits()


async def prune_history(work: Work, settings: Settings) -> None:
    """Delete old history rows, and the rows of deleted triggers that have no history left."""
    before = clock.now(-settings.get(HISTORY_DAYS) * DAY)
    while await work(lambda: _prune_batch(before)) == BATCH_SIZE:
        pass
    await work(lambda: _prune_triggers(before))


def _prune_batch(before: str) -> int:
    old = Fire.select(Fire.id).where((Fire.created_at < before) & ~PENDING).order_by(Fire.created_at).limit(BATCH_SIZE)
    return int(Fire.delete().where(Fire.id.in_(old)).execute())


def _prune_triggers(before: str) -> None:
    waiting = Fire.select(Fire.trigger_id).where(PENDING)  # rows without their trigger would wait for ever
    Trigger.delete().where((Trigger.deleted_at < before) & Trigger.id.not_in(waiting)).execute()


JOBS = (Job(FIRE_JOB, fire_slots, lease_seconds=LEASE_SECONDS),)
SCHEDULES = (
    Schedule("triggers.tick", 1.0, record_due_slots),
    Schedule("triggers.consume", 1.0, read_events),
    Schedule("triggers.sweep", 2.0, fire_waiting_slots),
    Schedule("triggers.absence", 5.0, end_waits),
    Schedule("triggers.prune", DAY, prune_history),
)
