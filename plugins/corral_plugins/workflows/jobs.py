"""Background jobs of the `workflows` plugin."""

from __future__ import annotations

import peewee

from corral import clock
from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.log import LoggedEvent
from corral.plugin import Settings
from corral_plugins.workflows.models import Run, StepRun, Workflow, WorkflowVersion, fetch_tuples
from corral_plugins.workflows.service.definitions import CANCEL_BATCH, CANCEL_JOB, cancel_runs_of_deleted
from corral_plugins.workflows.service.engine import Engine
from corral_plugins.workflows.service.event_waits import EventWaits
from corral_plugins.workflows.service.executors import StepExecutors
from corral_plugins.workflows.service.step_completion import StepEvents
from corral_plugins.workflows.service.wakeups import has_due_runs, queue_due_runs
from corral_plugins.workflows.settings import RUN_RETENTION_DAYS

BATCH = 200
PRUNE_BATCH = 50
STEP_BATCH = 5000
ROUNDS = 100


async def advance_run(run_id: str, engine: Engine) -> None:
    """Advance a run: process the steps that have ended, and start the steps that are ready."""
    await engine.advance(run_id)


async def sweep(database: Database, executors: StepExecutors, waits: EventWaits) -> None:
    """Take over the steps of dead processes, continue runs whose timers have expired, and look for awaited events."""
    entry = UnitContext(label="job workflows.sweep", actor=SYSTEM)
    await executors.take_over()
    while await database.read(has_due_runs, entry):
        await database.work(lambda: queue_due_runs(BATCH), entry=entry)
    await waits.complete_waiting_steps()


async def prune(work: Work, settings: Settings) -> None:
    """Delete runs that ended long ago, and those versions of deleted workflows that no run uses."""
    entry = UnitContext(label="job workflows.prune", actor=SYSTEM)
    days = settings.get(RUN_RETENTION_DAYS)
    for _ in range(ROUNDS if days is not None else 0):
        if await work(lambda: _prune_runs(days or 0), entry=entry) < PRUNE_BATCH:
            break
    for _ in range(ROUNDS):
        if await work(_prune_versions, entry=entry) < PRUNE_BATCH:
            break


async def cancel_runs(workflow_id: str, work: Work) -> None:
    """Cancel the active runs of a deleted workflow."""
    entry = UnitContext(label=f"job {CANCEL_JOB}", actor=SYSTEM)
    while await work(lambda: cancel_runs_of_deleted(workflow_id), entry=entry) == CANCEL_BATCH:
        continue


def on_event(event: LoggedEvent, events: StepEvents) -> None:
    """End the step that waits for the object of the event, if there is such a step."""
    events.handle(event)


def _prune_runs(days: int) -> int:
    before = clock.now(-days * 86_400)
    ended = (Run.created_at < before) & (Run.finished_at < before)  # the oldest by the index of their creation
    oldest = Run.select(Run.id).where(ended).order_by(Run.created_at, Run.id).limit(PRUNE_BATCH)
    found = [row[0] for row in fetch_tuples(oldest)]
    if found:
        steps = StepRun.select(StepRun.id).where(StepRun.run_id.in_(found)).limit(STEP_BATCH)
        if StepRun.delete().where(StepRun.id.in_(steps)).execute() == STEP_BATCH:
            return PRUNE_BATCH  # loops make many steps; the next unit of work deletes the others and the runs
        Run.delete().where(Run.id.in_(found)).execute()
    return len(found)


def _prune_versions() -> int:
    used = peewee.fn.EXISTS(Run.select(Run.id).where(Run.workflow_id == Workflow.id))
    gone = Workflow.deleted_at.is_null(False) & ~used
    found = [row[0] for row in fetch_tuples(Workflow.select(Workflow.id).where(gone).limit(PRUNE_BATCH))]
    if found:
        WorkflowVersion.delete().where(WorkflowVersion.workflow_id.in_(found)).execute()
        Workflow.delete().where(Workflow.id.in_(found)).execute()
    return len(found)
