"""Completes the steps that wait for tasks, approvals and other runs, when events about these objects arrive."""

from __future__ import annotations

import logging
from typing import Any

import peewee

from corral import clock
from corral.database.statement import Statement
from corral.events.log import LoggedEvent
from corral_plugins.workflows.api import RunResumed, StepResult
from corral_plugins.workflows.models import Run, StepRun
from corral_plugins.workflows.service.engine import Engine, emit_run_event, failure_report, log_unexpected, report_of
from corral_plugins.workflows.service.graph import Step
from corral_plugins.workflows.service.run_state import FINAL, RunState, StepRow
from corral_plugins.workflows.service.step_types import StepTypes
from corral_plugins.workflows.service.wakeups import wake

log = logging.getLogger("corral.workflows")
EVENTS = (
    "task.completed",
    "task.failed",
    "task.cancelled",
    "task.deleted",
    "task.retried",
    "approval.resolved",
    "workflow.run.completed",
    "workflow.run.failed",
    "workflow.run.cancelled",
)


_WAITS = Statement(lambda p: StepRun.select(StepRun.id).where(StepRun.waits_for == p("object")).limit(1).tuples())


class StepEvents:
    """Handles events about the objects that steps wait for. Runs in the unit of work of the event consumer."""

    def __init__(self, engine: Engine, types: StepTypes) -> None:
        self._engine, self._types = engine, types

    def handle(self, event: LoggedEvent) -> None:
        """Handle an event. Events about objects that no step waits for are ignored."""
        found = _WAITS.one({"object": event.object_id})
        row: Any = None if found is None else StepRun.get_or_none(StepRun.id == found[0])
        if row is None:
            return
        if event.type == "task.retried":
            self._resume_failed_run(row, event)
        elif row.status not in FINAL and row.report is None:
            self._resolve(row, event)

    def _resolve(self, row: Any, event: LoggedEvent) -> None:
        found = self._engine.load(row.run_id)
        if found is None:
            return
        state, graph = found
        mine = next((each for each in state.rows.values() if each.id == row.id), None)
        if mine is None:
            return
        result = self._result(state, graph.steps[row.name], mine, event)
        if result is None:
            return
        report, output = result if isinstance(result, tuple) else (report_of(result), result.output)
        wake(row.run_id)
        waits = (StepRun.id == row.id) & StepRun.status.not_in(FINAL) & StepRun.report.is_null()
        StepRun.update(report=report, output=output).where(waits).execute()

    def _result(
        self, state: RunState, step: Step, row: StepRow, event: LoggedEvent
    ) -> StepResult | tuple[dict[str, Any], Any] | None:
        kind = self._types.find(step.type)
        if kind is None or kind.resolve is None:
            return None
        try:
            context = self._engine.context(state, step, row, {}, waits_for=row.waits_for)
            return kind.resolve(context, event)
        except peewee.DatabaseError:  # the unit of work runs again
            raise
        except Exception as error:
            log_unexpected(error, step)
            return failure_report(error), None

    def _resume_failed_run(self, row: Any, event: LoggedEvent) -> None:
        """Let a failed run continue, because the task of its failed step is being retried."""
        run = Run.get_or_none(Run.id == row.run_id)
        if row.status != "failed" or run is None or run.status != "failed" or run.stop is not None:
            return
        going = {"status": "running", "error": None, "failure": None, "finished_at": None}
        if not Run.update(going).where((Run.id == run.id) & (Run.status == "failed")).execute():
            return
        wake(run.id)
        again = {"status": "running", "error": None, "report": None, "finished_at": None, "goto": None}
        StepRun.update(again).where(StepRun.id == row.id).execute()
        Run.update(deadline_at=None).where((Run.id == run.id) & (Run.deadline_at <= clock.now())).execute()
        emit_run_event(Run.get_by_id(run.id), RunResumed)
