"""Schedules the steps of a run: starts the steps that are ready, and advances the steps that have started."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.errors import FieldError
from corral.ids import new_id
from corral.schema.json_schema_validation import json_schema_errors
from corral_core.expressions.api import TemplateError
from corral_plugins.workflows.service.composite_steps import CANCELLED, CompositeSteps, ScopeEnd
from corral_plugins.workflows.service.failures import is_handled
from corral_plugins.workflows.service.graph import Scope, Step, taken_targets
from corral_plugins.workflows.service.rendering import RAW, Rendering
from corral_plugins.workflows.service.run_state import StepRow
from corral_plugins.workflows.service.step_changes import Iteration, Json, StepChanges

LEASE_SECONDS = 60
MISSING = {"kind": "error", "type": "plugin_disabled"}


class ScopePlanner:
    """Advances the scopes of a run: the workflow's own steps, and the steps inside loops and parallel steps."""

    def __init__(self, changes: StepChanges, rendering: Rendering) -> None:
        self._changes, self._rendering, self._state = changes, rendering, changes.state
        self._containers = CompositeSteps(changes, rendering, self)

    async def advance_scope(self, scope: Scope, iteration: Iteration, *, closing: bool = False) -> ScopeEnd | None:
        """Advance the steps of a scope. Return the result of the scope, or None if it is still running.

        After a step has failed, no new step starts, and running steps may finish. With `fail_fast`, running steps are
        cancelled. If `closing` is set, the result of the scope is no longer needed.
        """
        failed = self.first_failure(scope, iteration)
        is_complete = True
        last: StepRow | None = None
        for step in scope.steps:
            row = self._state.row(step, iteration)
            is_ending = closing or failed is not None
            if row is None and not is_ending:
                row = await self._try_begin(step, scope, iteration)
            if row is None:
                is_complete = False
                continue
            await self.advance_step(step, row, iteration, is_ending=is_ending)
            is_complete = is_complete and not row.is_open
            if row.status == "failed" and not is_handled(step, row):
                failed = failed or row
            if row.succeeded:
                last = row
        if failed is None and not closing:
            return ScopeEnd(last=last) if is_complete else None
        for step in scope.steps:
            row = self._state.row(step, iteration)
            if row is not None and row.is_open and (row.status != "running" or self._changes.is_fail_fast):
                self._changes.cancel_with_inner_steps(step, row, iteration)
        rows = [self._state.row(step, iteration) for step in scope.steps]
        if any(row is not None and row.is_open for row in rows):
            return None
        return ScopeEnd(error=failed.error if failed is not None else CANCELLED)

    def first_failure(self, scope: Scope, iteration: Iteration) -> StepRow | None:
        """Return the first step of a scope whose failure ends the scope, or None if there is no such step."""
        rows = ((step, self._state.row(step, iteration)) for step in scope.steps)
        return next((row for step, row in rows if row and row.status == "failed" and not is_handled(step, row)), None)

    async def _try_begin(self, step: Step, scope: Scope, iteration: Iteration) -> StepRow | None:
        """Start or skip a step if its predecessors have ended. Return its row, or None if the step has to wait."""
        if self._state.run.paused or not self._changes.may_change_more():
            return None
        rows = [self._state.row(scope.by_name[name], iteration) for name in step.predecessors]
        found = [row for row in rows if row is not None and not row.is_open]
        if len(found) < len(rows):
            return None
        reason = await self._reason_to_skip(step, scope, {row.name: row for row in found})
        if reason is not None:
            return self._changes.skip(step, iteration, reason)
        return await self.begin(step, iteration)

    async def _reason_to_skip(self, step: Step, scope: Scope, rows: dict[str, StepRow]) -> str | None:
        if any(rows[name].goto == step.name for name in step.jumps_from):
            return None
        if step.is_jump_only:
            return "branch_not_taken"
        deciders = [rows[name] for name in step.deciders]
        if deciders and not await self._is_taken(step, scope, deciders):
            failed = any(row.status == "failed" or row.reason == "upstream_failed" for row in deciders)
            return "upstream_failed" if failed else "branch_not_taken"
        needed = [rows[name] for name in dict.fromkeys((*step.depends_on, *step.deciders))]
        if _may_run(step.run_if, needed):
            return None
        failed = any(row.status == "failed" or row.reason == "upstream_failed" for row in needed)
        return "upstream_failed" if failed else "branch_not_taken"

    async def _is_taken(self, step: Step, scope: Scope, deciders: list[StepRow]) -> bool:
        completed = [row for row in deciders if row.status == "completed"]
        await self._rendering.load(completed)
        return any(step.name in taken_targets(scope.by_name[row.name], row.output) for row in completed)

    # -- starting

    async def begin(self, step: Step, iteration: Iteration) -> StepRow | None:
        """Start a step, or skip it if its condition `when` is false. Return None if too many steps are running."""
        if not self._changes.needs_no_slot(step) and self._changes.slots <= 0:
            return None
        try:
            if step.when is not None and not await self._rendering.boolean(step.when, step, iteration):
                return self._changes.skip(step, iteration, "condition")
        except TemplateError as error:
            row = self._state.add(step, iteration, "running")
            row.set(started_at=self._changes.now)
            self._changes.fail_template(step, row, error)
            return row
        row = self._state.add(step, iteration, "ready")
        await self._start_attempt(step, row, iteration)
        return row

    async def _start_attempt(self, step: Step, row: StepRow, iteration: Iteration) -> None:
        """Start an attempt of a step."""
        self._changes.changed += 1
        until = clock.now(step.timeout_seconds) if step.timeout_seconds is not None else None
        began = {"status": "running", "started_at": self._changes.now, "finished_at": None, "wake_at": until}
        row.set(**began, reason=None, error=None)
        kind = self._changes.kinds.get(step.type)
        if kind is None:
            detail = f"No active plugin provides the step type {step.type}."
            self._changes.fail(step, row, {**MISSING, "message": detail}, retryable=False)
            return
        if kind.execute is not None:
            row.set(lease=new_id(), lease_until=clock.now(LEASE_SECONDS))
            self._changes.plan.executed.append(row)
        else:
            try:
                config = await self._rendering.render(step, iteration)
            except TemplateError as error:
                self._changes.fail_template(step, row, error)
                return
            raw = RAW.get(step.type, frozenset())
            row.set(input={key: value for key, value in config.items() if key not in raw})
            if faults := json_schema_errors(kind.schema, config):
                self._changes.fail(step, row, _invalid_configuration_error(faults), retryable=False)
                return
            if kind.dispatch is None:
                self._changes.plan.events.append(("started", row))
                await self._run_control_step(step, row, config, iteration)
                return
            self._changes.plan.dispatched.append((step, row, config))
        self._changes.slots -= 1
        self._changes.plan.events.append(("started", row))

    async def _run_control_step(self, step: Step, row: StepRow, config: Json, iteration: Iteration) -> None:
        """Run a control step, which the engine itself carries out."""
        try:
            match step.type:
                case "transform":
                    await self._changes.complete(step, row, config["value"])
                case "condition":
                    result = await self._rendering.boolean(config["expression"], step, iteration)
                    await self._changes.complete(step, row, {"result": result})
                case "switch":
                    cases = [case["equals"] for case in config["cases"]]
                    chosen = (n for n, each in enumerate(cases) if _equal_json(each, config["value"]))
                    await self._changes.complete(step, row, {"case": next(chosen, None)})
                case "wait":
                    self._begin_wait(row, config)
                case "loop":
                    row.set(cursor=0)
        except TemplateError as error:
            self._changes.fail_template(step, row, error)
        except ValueError:
            message = "until is not an instant such as 2026-01-31T09:30:00Z."
            self._changes.fail(step, row, {"type": "invalid_configuration", "message": message}, retryable=False)

    def _begin_wait(self, row: StepRow, config: Json) -> None:
        if "event" in config:
            wanted = config["event"]
            seconds = wanted.get("timeout_seconds")
            row.set(event=wanted["event"], wake_at=clock.now(seconds) if seconds is not None else None)
        elif "seconds" in config:
            row.set(wake_at=clock.now(config["seconds"]))
        else:
            row.set(wake_at=clock.format_instant(clock.parse_instant(config["until"])))
        row.set(status="waiting", cursor=None)
        self._changes.plan.events.append(("waiting", row))

    # -- steps that have started

    async def advance_step(self, step: Step, row: StepRow, iteration: Iteration, *, is_ending: bool = False) -> None:
        """Advance a step that has been reached.

        Start its next attempt if it is due, end the step if its timer has expired, and advance the steps inside it.
        """
        if not row.is_open:
            return
        if row.status == "ready":
            if is_ending:
                self._changes.cancel(step, row)
            elif self._may_start_again(step, row):
                await self._start_attempt(step, row, iteration)
        elif row.wake_at is not None and row.wake_at <= self._changes.now:
            await self._end_timer(step, row)
        if step.is_container and row.status == "running":
            await self._containers.advance(step, row, iteration, is_ending=is_ending)

    def _may_start_again(self, step: Step, row: StepRow) -> bool:
        changes, is_due = self._changes, row.wake_at is not None and row.wake_at <= self._changes.now
        has_slot = changes.needs_no_slot(step) or changes.slots > 0
        return is_due and has_slot and not self._state.run.paused and changes.may_change_more()

    async def _end_timer(self, step: Step, row: StepRow) -> None:
        """End a step whose timer has expired. A step of the type `wait` completes; any other step fails."""
        if step.type == "wait":
            await self._changes.complete(step, row, None)
            return
        self._changes.cancel_elsewhere(step, row)
        message = "Nobody answered in time." if row.person else "The step exceeded its time limit."
        error = {"kind": "timeout", "type": "expired" if row.person else "timeout", "message": message}
        self._changes.fail(step, row, error, retryable=not row.person)


def _equal_json(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal. Unlike in Python, a number is never equal to a boolean."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _may_run(run_if: str, needed: list[StepRow]) -> bool:
    """Return whether the predecessors of a step, which have ended, satisfy the step's `run_if`."""
    completed = sum(row.succeeded for row in needed)
    failed = sum(row.status == "failed" for row in needed)
    match run_if:
        case "success":
            return not failed and (completed > 0 or not needed)
        case "all_success":
            return completed == len(needed)
        case "any_success":
            return completed > 0 or not needed
        case "any_failed":
            return failed > 0
        case _:
            return True


def _invalid_configuration_error(faults: list[FieldError]) -> Json:
    detail = "; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults[:5])
    return {"type": "invalid_configuration", "message": f"The configuration of the step is not valid: {detail}"}
