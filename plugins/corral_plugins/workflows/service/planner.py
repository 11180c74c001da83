"""Computes the next changes to a run: applies the results of ended steps, and starts the steps that are ready.

This module does not write to the database. Control steps, such as conditions, are carried out by the engine itself and
end immediately, so that a run can pass many of them at once. Other steps are collected: `dispatch` and `cancel` are
called in the transaction that writes the changes, and steps with `execute` start after the transaction.
"""

from __future__ import annotations

from typing import Any

from corral import clock
from corral_core.expressions.api import TemplateError
from corral_plugins.workflows.service.composite_steps import output_of
from corral_plugins.workflows.service.failures import error_of
from corral_plugins.workflows.service.graph import Graph, Step
from corral_plugins.workflows.service.large_outputs import LargeOutputs
from corral_plugins.workflows.service.rendering import Rendering
from corral_plugins.workflows.service.run_state import RunState, StepRow
from corral_plugins.workflows.service.step_changes import Json, Plan, StepChanges, is_container
from corral_plugins.workflows.service.step_scheduling import ScopePlanner
from corral_plugins.workflows.service.step_types import StepTypes


class Planner:
    """Computes the next changes to a workflow run. The method `run` changes `state` and returns the plan."""

    def __init__(
        self,
        state: RunState,
        graph: Graph,
        types: StepTypes,
        rendering: Rendering,
        outputs: LargeOutputs,
        *,
        max_parallel: int,
    ) -> None:
        self._state, self._graph, self._rendering = state, graph, rendering
        self._changes = StepChanges(state, graph, types, outputs, max_parallel=max_parallel)
        self._scopes = ScopePlanner(self._changes, rendering)

    async def run(self) -> Plan:
        """Compute the next changes to the run, and return the plan."""
        state, run = self._state, self._state.run
        await self._apply_reports()
        is_late = run.deadline_at is not None and run.deadline_at <= self._changes.now and run.people_since is None
        if is_late and not run.stop:
            state.set(stop={"kind": "timeout", "type": "timeout", "message": "The run exceeded its time limit."})
        if run.stop is not None:
            self._cancel_unfinished_steps()
        elif run.failure is not None and run.failure.get("is_final"):
            await self._run_failure_step()
        else:
            await self._advance_root()
        self._set_due()
        await self._rendering.load(row for name, row in self._changes.plan.events if name == "completed")
        return self._changes.plan

    # -- the run

    async def _advance_root(self) -> None:
        end = await self._scopes.advance_scope(self._graph.root, ())
        if end is None:
            self._set_status()
            return
        if end.error is not None:
            self._state.set(failure={**end.error, "is_final": True})
            await self._run_failure_step()
            return
        try:
            output = await self._output()
        except TemplateError as error:
            fault = error_of("", "error", "template_error", f"output: {error.detail}")
            self._end_run("failed", error=fault)
            return
        self._end_run("completed", output=output)

    async def _output(self) -> Any:
        """Return the output of the run: `config.output`, or by default the outputs of the leaf steps, keyed by name."""
        wanted = self._graph.config.get("output")
        if wanted is not None:
            return await self._rendering.output(wanted)
        rows = [self._state.row(self._graph.steps[name], ()) for name in self._graph.root.leaves]
        completed = [row for row in rows if row is not None and row.succeeded]
        await self._rendering.load(completed)
        return {row.name: output_of(row) for row in completed}

    async def _run_failure_step(self) -> None:
        step, failure = self._graph.failure_step, dict(self._state.run.failure or {})
        failure.pop("is_final", None)
        if step is not None:
            row = self._state.row(step, ())
            if row is None:
                row = await self._scopes.begin(step, ())
            if row is not None:
                await self._scopes.advance_step(step, row, ())
            if row is None or row.is_open:
                self._set_status()
                return
        self._end_run("failed", error=failure)

    def _cancel_unfinished_steps(self) -> None:
        """Cancel all unfinished steps. When all of them have ended, the run ends."""
        for row in self._state.rows.values():
            if row.is_open:
                self._changes.cancel(self._graph.steps[row.name], row)
        if any(row.is_open for row in self._state.rows.values()):
            self._state.set(status="running")
            return
        stop = dict(self._state.run.stop or {})
        if stop["kind"] == "cancel":
            self._end_run("cancelled", error=None)
            return
        self._end_run("failed", error={"step": "", **stop})

    def _end_run(self, status: str, *, output: Any = None, error: Json | None = None) -> None:
        for row in self._state.rows.values():
            if row.is_open:  # the work elsewhere is being cancelled, and its end no longer matters
                self._changes.finish(row, "cancelled")
        self._state.set(status=status, output=output, error=error, finished_at=self._changes.now, paused=False)

    def _set_status(self) -> None:
        """Set the status of a run that continues.

        While the run is paused or is waiting for people, its time limit is suspended.
        """
        run, rows = self._state.run, [row for row in self._state.rows.values() if row.is_open]
        rows = [row for row in rows if not is_container(row)]
        is_running = any(row.status == "running" for row in rows) or not rows or self._changes.plan.is_partial
        if run.paused:
            status = "paused"
        else:
            status = "running" if is_running else "waiting"
        if status != run.status:
            self._state.set(status=status)
        waits = status == "paused" or (status == "waiting" and any(row.person for row in rows))
        if waits and run.people_since is None:
            self._state.set(people_since=self._changes.now)
        elif not waits and run.people_since is not None:
            waited = clock.elapsed_ms(run.people_since, self._changes.now) / 1000
            deadline = clock.format_instant(clock.parse_instant(run.deadline_at) + waited) if run.deadline_at else None
            self._state.set(people_since=None, deadline_at=deadline)

    def _set_due(self) -> None:
        """Set the run's `due_at` to the time at which its next timer ends."""
        run = self._state.run
        if run.finished_at is not None:
            self._state.set(due_at=clock.LAST)
            return
        rows = (row for row in self._state.rows.values() if row.is_open and not self._is_held_back(row))
        timers = [row.wake_at for row in rows if row.wake_at is not None]
        if run.deadline_at is not None and run.people_since is None:
            timers.append(run.deadline_at)
        due = min(timers, default=clock.LAST)
        if due != run.due_at:
            self._state.set(due_at=due)

    def _is_held_back(self, row: StepRow) -> bool:
        """Return whether a step's next attempt is delayed by a pause or by other running steps, not by a timer."""
        return row.status == "ready" and (self._state.run.paused or (row.wake_at or "") <= self._changes.now)

    # -- steps that have ended

    async def _apply_reports(self) -> None:
        for row in self._state.rows.values():
            if row.report is not None and row.is_open:
                await self._apply_report(self._graph.steps[row.name], row, row.report)

    async def _apply_report(self, step: Step, row: StepRow, report: Json) -> None:
        self._changes.changed += 1
        cost = int(report.get("cost_micro") or 0)
        if cost:
            row.set(cost_micro=row.cost_micro + cost)
            self._add_cost(cost)
        if report.get("tainted"):
            self._state.set(tainted=True)
        status = report["status"]
        if row.reason == "cancelling" and status != "completed":
            self._changes.finish(row, "cancelled")
            return
        if status == "completed" and report.get("is_large"):
            await self._rendering.load([row])
            await self._changes.complete(step, row, row.output, goto=report.get("goto"))
            return
        if status == "completed":
            self._changes.finish(row, "completed", goto=report.get("goto"), error=None)
            return
        if status == "ready":  # a person asked for another attempt
            row.set(report=None, status="ready", reason=None, wake_at=self._changes.now, person=False)
            return
        if status == "skipped":
            self._changes.finish(row, "skipped", goto=report.get("goto"), reason=report.get("reason"), error=None)
            return
        error = report.get("error") or {"type": "cancelled", "message": "The work of the step was cancelled."}
        if error.get("kind") == "budget" and "max_cost_usd" not in step.config:
            self._exceed_budget()
        if report.get("goto"):
            self._changes.finish(row, "failed", goto=report["goto"], error={"step": row.name, "kind": "error", **error})
            return
        is_final = bool(report.get("is_final"))
        self._changes.fail(step, row, error, retryable=bool(report.get("retryable")), is_final=is_final)

    def _add_cost(self, cost: int) -> None:
        run, limit = self._state.run, self._graph.config.get("max_cost_usd")
        self._state.set(cost_micro=run.cost_micro + cost)
        if limit is not None and run.cost_micro > round(limit * 1e6):
            self._exceed_budget()

    def _exceed_budget(self) -> None:
        """Stop a run that has exceeded its cost limit, or whose next step would exceed this limit."""
        limit = self._graph.config.get("max_cost_usd")
        if limit is not None and self._state.run.stop is None:
            message = f"The run would cost more than its limit of {limit:g} USD."
            self._state.set(stop={"kind": "budget", "type": "budget_exceeded", "message": message})
