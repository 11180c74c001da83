"""Computes one advance of a run: applies the steps that have ended, and starts those that are ready.

Nothing is written here. Control-plane steps such as conditions end at once, so that one advance can pass many of them.
Steps that do work elsewhere are collected: `dispatch` and `cancel` are called in the transaction of the advance, and
steps with `execute` start after it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.errors import FieldError
from corral.ids import new_id
from corral.schema.json_schema_validation import json_schema_errors
from corral_core.expressions.api import TemplateError
from corral_plugins.workflows.service.failures import end_attempt, error_of, is_handled
from corral_plugins.workflows.service.graph import Graph, Scope, Step, taken_targets
from corral_plugins.workflows.service.rendering import RAW, Rendering
from corral_plugins.workflows.service.run_state import RunState, StepRow
from corral_plugins.workflows.service.step_types import StepTypes

Json = dict[str, Any]
Iteration = tuple[int, ...]
BATCH = 200
"""The maximum number of steps that one advance changes, so that its transaction stays short."""
OUTPUT_LIMIT = 256 * 1024
LEASE_SECONDS = 60
CANCELLED = {"kind": "error", "type": "cancelled", "message": "The steps were cancelled."}
MISSING = {"kind": "error", "type": "plugin_disabled"}


class ScopeEnd(msgspec.Struct, kw_only=True):
    """The end of a scope. `error` is that of the first step that failed; `last` is the last step that completed."""

    error: Json | None = None
    last: StepRow | None = None


class Plan(msgspec.Struct, kw_only=True):
    """What the transaction of an advance must do besides writing the rows.

    `events` are pairs of an event and a row. `is_partial` means that more steps could advance at once.
    """

    dispatched: list[tuple[Step, StepRow, Json]] = []
    executed: list[StepRow] = []
    cancelled: list[tuple[Step, StepRow, str]] = []
    aborted: list[str] = []
    events: list[tuple[str, StepRow]] = []
    is_partial: bool = False


class Planner:
    """Computes one advance of a run. `run` changes the `state` and returns the plan."""

    def __init__(
        self, state: RunState, graph: Graph, types: StepTypes, rendering: Rendering, *, max_parallel: int
    ) -> None:
        self._state, self._graph, self._rendering = state, graph, rendering
        self._kinds = {name: kind for name, (_, kind) in types.all().items()}
        self._plan, self._now = Plan(), clock.now()
        self._changed = 0
        running = [row for row in state.rows.values() if row.status == "running" and not self._is_container(row)]
        self._slots = max_parallel - len(running)

    async def run(self) -> Plan:
        """Compute the advance."""
        state, run = self._state, self._state.run
        self._apply_reports()
        if run.deadline_at is not None and run.deadline_at <= self._now and run.people_since is None and not run.stop:
            state.set(stop={"kind": "timeout", "type": "timeout", "message": "The run exceeded its time limit."})
        if run.stop is not None:
            self._stop()
        elif run.failure is not None and run.failure.get("is_final"):
            await self._run_failure_step()
        else:
            await self._advance_root()
        self._set_due()
        return self._plan

    # -- the run

    async def _advance_root(self) -> None:
        end = await self._settle(self._graph.root, ())
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
            self._end("failed", error=fault)
            return
        self._end("completed", output=output)

    async def _output(self) -> Any:
        """Return the output of the run: `config.output`, or else the outputs of the leaf steps by name."""
        wanted = self._graph.config.get("output")
        if wanted is not None:
            return await self._rendering.output(wanted)
        rows = [self._state.row(self._graph.steps[name], ()) for name in self._graph.root.leaves]
        completed = [row for row in rows if row is not None and row.succeeded]
        await self._rendering.load(completed)
        return {row.name: _output_of(row) for row in completed}

    async def _run_failure_step(self) -> None:
        step, failure = self._graph.failure_step, dict(self._state.run.failure or {})
        failure.pop("is_final", None)
        if step is not None:
            row = self._state.row(step, ())
            if row is None:
                row = await self._begin(step, ())
            if row is not None:
                await self._progress(step, row, ())
            if row is None or row.is_open:
                self._set_status()
                return
        self._end("failed", error=failure)

    def _stop(self) -> None:
        """Cancel every step that has not ended. When all have ended, the run ends."""
        for row in self._state.rows.values():
            if row.is_open:
                self._cancel(self._graph.steps[row.name], row)
        if any(row.is_open for row in self._state.rows.values()):
            self._state.set(status="running")
            return
        stop = dict(self._state.run.stop or {})
        if stop["kind"] == "cancel":
            self._end("cancelled", error=None)
            return
        self._end("failed", error={"step": "", **stop})

    def _end(self, status: str, *, output: Any = None, error: Json | None = None) -> None:
        for row in self._state.rows.values():
            if row.is_open:  # the work elsewhere is being cancelled, and its end no longer matters
                self._finish(row, "cancelled")
        self._state.set(status=status, output=output, error=error, finished_at=self._now, paused=False)

    def _set_status(self) -> None:
        """Set the status of a run that goes on, and stop the clock of its time limit while it waits for people."""
        run, rows = self._state.run, [row for row in self._state.rows.values() if row.is_open]
        rows = [row for row in rows if not self._is_container(row)]
        is_running = any(row.status == "running" for row in rows) or not rows or self._plan.is_partial
        if run.paused:
            status = "paused"
        else:
            status = "running" if is_running else "waiting"
        if status != run.status:
            self._state.set(status=status)
        waits = status == "paused" or (status == "waiting" and any(row.person for row in rows))
        if waits and run.people_since is None:
            self._state.set(people_since=self._now)
        elif not waits and run.people_since is not None:
            waited = clock.elapsed_ms(run.people_since, self._now) / 1000
            deadline = clock.format_instant(clock.parse_instant(run.deadline_at) + waited) if run.deadline_at else None
            self._state.set(people_since=None, deadline_at=deadline)

    def _set_due(self) -> None:
        """Set the time of the next timer of the run."""
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
        """Return whether the next attempt of a step waits for the end of a pause or of another step, not for time."""
        return row.status == "ready" and (self._state.run.paused or (row.wake_at or "") <= self._now)

    # -- steps that have ended

    def _apply_reports(self) -> None:
        for row in self._state.rows.values():
            if row.report is not None and row.is_open:
                self._apply_report(self._graph.steps[row.name], row, row.report)

    def _apply_report(self, step: Step, row: StepRow, report: Json) -> None:
        self._changed += 1
        cost = int(report.get("cost_micro") or 0)
        if cost:
            row.set(cost_micro=row.cost_micro + cost)
            self._spend(cost)
        if report.get("tainted"):
            self._state.set(tainted=True)
        status = report["status"]
        if row.reason == "cancelling" and status != "completed":
            self._finish(row, "cancelled")
            return
        if status == "completed":
            self._finish(row, "completed", goto=report.get("goto"), error=None)
            return
        if status == "ready":  # a person asked for another attempt
            row.set(report=None, status="ready", reason=None, wake_at=self._now, person=False)
            return
        if status == "skipped":
            self._finish(row, "skipped", goto=report.get("goto"), reason=report.get("reason"), error=None)
            return
        error = report.get("error") or {"type": "cancelled", "message": "The work of the step was cancelled."}
        if report.get("goto"):
            self._finish(row, "failed", goto=report["goto"], error={"step": row.name, "kind": "error", **error})
            return
        self._fail(step, row, error, retryable=bool(report.get("retryable")), is_final=bool(report.get("is_final")))

    def _spend(self, cost: int) -> None:
        run, limit = self._state.run, self._graph.config.get("max_cost_usd")
        self._state.set(cost_micro=run.cost_micro + cost)
        if limit is not None and run.cost_micro > round(limit * 1e6) and run.stop is None:
            message = f"The run has cost more than its limit of {limit:g} USD."
            self._state.set(stop={"kind": "budget", "type": "budget_exceeded", "message": message})

    def _finish(self, row: StepRow, status: str, **changes: Any) -> None:
        ended: Json = {"lease": None, "lease_until": None, "event": None, "wake_at": None, "report": None}
        row.set(**ended | {"status": status, "person": False, "finished_at": self._now} | changes)
        if status != "cancelled":
            self._plan.events.append((status, row))

    def _complete(self, step: Step, row: StepRow, output: Any, **changes: Any) -> None:
        if len(msgspec.json.encode(output)) > OUTPUT_LIMIT:
            error = {"type": "output_too_large", "message": "The output of the step is larger than 256 KiB."}
            self._fail(step, row, error, retryable=False)
            return
        row.set(output=output)
        self._finish(row, "completed", error=None, **changes)

    def _fail(self, step: Step, row: StepRow, error: Json, *, retryable: bool, is_final: bool = False) -> None:
        if is_final:
            step = msgspec.structs.replace(step, on_error="fail")
        kind = self._kinds.get(row.type)
        if step.is_container:
            self._cancel_parts(step, tuple(row.iteration))
        end_attempt(step, row, error, retryable=retryable and not (kind is not None and kind.own_retries))
        if row.status == "failed":
            self._plan.events.append(("failed", row))
        elif row.status == "waiting":
            self._plan.events.append(("waiting", row))

    # -- scopes

    async def _settle(self, scope: Scope, iteration: Iteration, *, closing: bool = False) -> ScopeEnd | None:
        """Advance the steps of a scope. Return how the scope ended, or None if it goes on.

        After a step has failed no further step starts, and running steps end; with `fail_fast` they are cancelled.
        While a scope is `closing`, its result is not needed any more.
        """
        failed = self._first_failure(scope, iteration)
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
            await self._progress(step, row, iteration, is_ending=is_ending)
            is_complete = is_complete and not row.is_open
            if row.status == "failed" and not is_handled(step, row):
                failed = failed or row
            if row.succeeded:
                last = row
        if failed is None and not closing:
            return ScopeEnd(last=last) if is_complete else None
        for step in scope.steps:
            row = self._state.row(step, iteration)
            if row is not None and row.is_open and (row.status != "running" or self._is_fail_fast):
                self._cancel_with_parts(step, row, iteration)
        rows = [self._state.row(step, iteration) for step in scope.steps]
        if any(row is not None and row.is_open for row in rows):
            return None
        return ScopeEnd(error=failed.error if failed is not None else CANCELLED)

    def _first_failure(self, scope: Scope, iteration: Iteration) -> StepRow | None:
        rows = ((step, self._state.row(step, iteration)) for step in scope.steps)
        return next((row for step, row in rows if row and row.status == "failed" and not is_handled(step, row)), None)

    @property
    def _is_fail_fast(self) -> bool:
        return bool(self._graph.config.get("fail_fast"))

    async def _try_begin(self, step: Step, scope: Scope, iteration: Iteration) -> StepRow | None:
        """Start or skip a step if its predecessors have ended. Return its row, or None if it has to wait."""
        if self._state.run.paused or not self._has_room():
            return None
        rows = [self._state.row(scope.by_name[name], iteration) for name in step.predecessors]
        found = [row for row in rows if row is not None and not row.is_open]
        if len(found) < len(rows):
            return None
        reason = await self._reason_to_skip(step, scope, {row.name: row for row in found})
        if reason is not None:
            return self._skip(step, iteration, reason)
        return await self._begin(step, iteration)

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

    def _skip(self, step: Step, iteration: Iteration, reason: str) -> StepRow:
        self._changed += 1
        row = self._state.add(step, iteration, "pending")
        self._finish(row, "skipped", reason=reason)
        return row

    def _has_room(self) -> bool:
        if self._changed < BATCH:
            return True
        self._plan.is_partial = True
        return False

    # -- starting

    async def _begin(self, step: Step, iteration: Iteration) -> StepRow | None:
        """Start a step, or skip it because of `when`. Return None if too many steps are running."""
        if not self._is_instant(step) and self._slots <= 0:
            return None
        try:
            if step.when is not None and not await self._rendering.boolean(step.when, step, iteration):
                return self._skip(step, iteration, "condition")
        except TemplateError as error:
            row = self._state.add(step, iteration, "running")
            row.set(started_at=self._now)
            self._fail_template(step, row, error)
            return row
        row = self._state.add(step, iteration, "ready")
        await self._start(step, row, iteration)
        return row

    async def _start(self, step: Step, row: StepRow, iteration: Iteration) -> None:
        """Start an attempt of a step."""
        self._changed += 1
        until = clock.now(step.timeout_seconds) if step.timeout_seconds is not None else None
        row.set(status="running", started_at=self._now, finished_at=None, reason=None, wake_at=until, error=None)
        kind = self._kinds.get(step.type)
        if kind is None:
            detail = f"No active plugin provides the step type {step.type}."
            self._fail(step, row, {**MISSING, "message": detail}, retryable=False)
            return
        if kind.execute is not None:
            row.set(lease=new_id(), lease_until=clock.now(LEASE_SECONDS))
            self._plan.executed.append(row)
        else:
            try:
                config = await self._rendering.render(step, iteration)
            except TemplateError as error:
                self._fail_template(step, row, error)
                return
            raw = RAW.get(step.type, frozenset())
            row.set(input={key: value for key, value in config.items() if key not in raw})
            if faults := json_schema_errors(kind.schema, config):
                self._fail(step, row, _invalid_configuration(faults), retryable=False)
                return
            if kind.dispatch is None:
                self._plan.events.append(("started", row))
                await self._control(step, row, config, iteration)
                return
            self._plan.dispatched.append((step, row, config))
        self._slots -= 1
        self._plan.events.append(("started", row))

    def _fail_template(self, step: Step, row: StepRow, error: TemplateError) -> None:
        self._fail(step, row, {"type": "template_error", "message": error.detail}, retryable=False)

    async def _control(self, step: Step, row: StepRow, config: Json, iteration: Iteration) -> None:
        """Run a step that the engine itself carries out."""
        try:
            match step.type:
                case "transform":
                    self._complete(step, row, config["value"])
                case "condition":
                    result = await self._rendering.boolean(config["expression"], step, iteration)
                    self._complete(step, row, {"result": result})
                case "switch":
                    cases = [case["equals"] for case in config["cases"]]
                    chosen = (n for n, each in enumerate(cases) if _same(each, config["value"]))
                    self._complete(step, row, {"case": next(chosen, None)})
                case "wait":
                    self._wait(row, config)
                case "loop":
                    row.set(cursor=0)
        except TemplateError as error:
            self._fail_template(step, row, error)
        except ValueError:
            message = "until is not an instant such as 2026-01-31T09:30:00Z."
            self._fail(step, row, {"type": "invalid_configuration", "message": message}, retryable=False)

    def _wait(self, row: StepRow, config: Json) -> None:
        if "event" in config:
            wanted = config["event"]
            seconds = wanted.get("timeout_seconds")
            row.set(event=wanted["event"], wake_at=clock.now(seconds) if seconds is not None else None)
        elif "seconds" in config:
            row.set(wake_at=clock.now(config["seconds"]))
        else:
            row.set(wake_at=clock.format_instant(clock.parse_instant(config["until"])))
        row.set(status="waiting", cursor=None)
        self._plan.events.append(("waiting", row))

    # -- steps that have started

    async def _progress(self, step: Step, row: StepRow, iteration: Iteration, *, is_ending: bool = False) -> None:
        """Advance a step that has started: its parts, its timers and its next attempt."""
        if not row.is_open:
            return
        if row.status == "ready":
            if is_ending:
                self._cancel(step, row)
            elif self._may_start_again(step, row):
                await self._start(step, row, iteration)
        elif row.wake_at is not None and row.wake_at <= self._now:
            self._end_timer(step, row)
        if step.is_container and row.status == "running":
            if row.cursor is None and step.type == "loop":
                row.set(cursor=0)
            advance = self._advance_loop if step.type == "loop" else self._advance_parallel
            await advance(step, row, iteration, is_ending=is_ending)

    def _may_start_again(self, step: Step, row: StepRow) -> bool:
        is_due = row.wake_at is not None and row.wake_at <= self._now and not self._state.run.paused
        return is_due and self._has_room() and (self._is_instant(step) or self._slots > 0)

    def _end_timer(self, step: Step, row: StepRow) -> None:
        """End a step whose time has come. A step that waits for time or an event completes; others fail."""
        if step.type == "wait":
            self._complete(step, row, None)
            return
        self._cancel_elsewhere(step, row)
        message = "Nobody answered in time." if row.person else "The step exceeded its time limit."
        error = {"kind": "timeout", "type": "expired" if row.person else "timeout", "message": message}
        self._fail(step, row, error, retryable=not row.person)

    # -- loops

    async def _advance_loop(self, step: Step, row: StepRow, iteration: Iteration, *, is_ending: bool) -> None:
        assert step.body is not None
        items = await self._rendering.items(row)
        active, collects = 0, step.config.get("on_item_error") == "collect"
        started = range(row.cursor or 0)
        failures = (self._first_failure(step.body, (*iteration, n)) for n in started)
        is_closing = is_ending or (not collects and any(each is not None for each in failures))
        failed: Json | None = None
        ends: list[ScopeEnd | None] = []
        for n in started:
            end = await self._settle(step.body, (*iteration, n), closing=is_closing)
            ends.append(end)
            active += end is None
            if end is not None and end.error is not None and end.error != CANCELLED and not collects:
                failed = failed or {**end.error, "message": f"Iteration {n}: {end.error.get('message', '')}"}
        limit = step.config.get("concurrency", 1) if items is not None else 1
        while failed is None and not is_closing and active < limit and self._has_room() and not self._state.run.paused:
            n = row.cursor or 0
            if not await self._has_next(step, row, iteration, items, n):
                break
            row.set(cursor=n + 1)
            self._changed += 1
            end = await self._settle(step.body, (*iteration, n))
            ends.append(end)
            active += end is None
            if end is not None and end.error is not None and not collects:
                failed = {**end.error, "message": f"Iteration {n}: {end.error.get('message', '')}"}
        if active or not row.is_open:
            return
        if failed is not None:
            self._fail(step, row, {"kind": "error", **failed}, retryable=False)
            return
        if is_ending:
            self._finish(row, "cancelled")
            return
        total = len(items) if items is not None else None
        if (total is None and self._changed < BATCH and not self._state.run.paused) or row.cursor == total:
            await self._complete_loop(step, row, ends)

    async def _has_next(self, step: Step, row: StepRow, iteration: Iteration, items: list[Any] | None, n: int) -> bool:
        """Return whether a loop has an iteration `n`. The loop fails if it has more iterations than it may have."""
        most = step.config.get("max_iterations", 100)
        try:
            more = n < len(items) if items is not None else await self._rendering.continues(step, iteration, n)
        except TemplateError as error:
            self._fail_template(step, row, error)
            return False
        if more and n >= most:
            fault = {"type": "max_iterations", "message": f"The loop needs more than {most} iterations."}
            self._fail(step, row, fault, retryable=False)
            return False
        return more

    async def _complete_loop(self, step: Step, row: StepRow, ends: list[ScopeEnd | None]) -> None:
        lasts = [end.last if end is not None and end.error is None else None for end in ends]
        await self._rendering.load(last for last in lasts if last is not None)
        errors = [
            {"index": n, "error": {key: end.error.get(key) for key in ("step", "kind", "type", "message")}}
            for n, end in enumerate(ends)
            if end is not None and end.error is not None
        ]
        results = [None if last is None else _output_of(last) for last in lasts]
        self._complete(step, row, {"results": results, "errors": errors})

    # -- parallel branches

    async def _advance_parallel(self, step: Step, row: StepRow, iteration: Iteration, *, is_ending: bool) -> None:
        join, total = step.config.get("join", "all"), len(step.branches)
        needed = min(join, total) if isinstance(join, int) else 1 if join == "any" else total
        ends: dict[str, ScopeEnd | None] = {}
        for name, scope in step.branches.items():
            ends[name] = await self._settle(scope, iteration, closing=is_ending)
        done = [name for name, end in ends.items() if end is not None and end.error is None]
        failures = [end.error for end in ends.values() if end is not None and end.error is not None]
        is_decided = len(done) >= needed or len(failures) > total - needed
        if is_decided and len(done) >= needed:
            self._cancel_open_branches(step, ends, iteration)
        if is_decided or is_ending:
            for name, scope in step.branches.items():
                ends[name] = ends[name] or await self._settle(scope, iteration, closing=True)
        if any(end is None for end in ends.values()):
            return
        if len(done) >= needed:
            lasts = {name: end.last for name, end in ends.items() if end is not None and name in done}
            await self._rendering.load(last for last in lasts.values() if last is not None)
            found = {name: lasts.get(name) for name in step.branches}
            self._complete(step, row, {name: last and _output_of(last) for name, last in found.items()})
        elif is_ending:
            self._finish(row, "cancelled")
        else:
            self._fail(step, row, {"kind": "error", **failures[0]}, retryable=False)

    def _cancel_open_branches(self, step: Step, ends: dict[str, ScopeEnd | None], iteration: Iteration) -> None:
        for name, scope in step.branches.items():
            if ends[name] is None:
                self._cancel_scope(scope, iteration)

    # -- cancelling

    def _cancel_with_parts(self, step: Step, row: StepRow, iteration: Iteration) -> None:
        if step.is_container:
            self._cancel_parts(step, iteration)
        self._cancel(step, row)

    def _cancel_parts(self, step: Step, iteration: Iteration) -> None:
        row = self._state.row(step, iteration)
        for scope in step.branches.values():
            self._cancel_scope(scope, iteration)
        if step.body is not None and row is not None:
            for n in range(row.cursor or 0):
                self._cancel_scope(step.body, (*iteration, n))

    def _cancel_scope(self, scope: Scope, iteration: Iteration) -> None:
        for step in scope.steps:
            row = self._state.row(step, iteration)
            if row is not None and row.is_open:
                self._cancel_with_parts(step, row, iteration)

    def _cancel(self, step: Step, row: StepRow) -> None:
        """Cancel a step. If its work is done elsewhere, the step ends when that work has ended."""
        if row.reason == "cancelling":
            return
        self._changed += 1
        if row.lease is not None:
            self._plan.aborted.append(row.id)
        if not self._cancel_elsewhere(step, row):
            self._finish(row, "cancelled")

    def _cancel_elsewhere(self, step: Step, row: StepRow) -> bool:
        kind = self._kinds.get(step.type)
        if kind is None or kind.cancel is None or row.waits_for is None or row.reason == "error":
            return False
        row.set(reason="cancelling", wake_at=None)
        self._plan.cancelled.append((step, row, row.waits_for))
        return True

    # -- kinds of steps

    def _is_container(self, row: StepRow) -> bool:
        return row.type in ("loop", "parallel")

    def _is_instant(self, step: Step) -> bool:
        kind = self._kinds.get(step.type)
        return kind is None or (kind.execute is None and kind.dispatch is None) or kind.waits


def _output_of(row: StepRow) -> Any:
    return None if row.output is UNSET else row.output


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal. Unlike in Python, a number never equals a boolean."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _may_run(run_if: str, needed: list[StepRow]) -> bool:
    """Return whether `run_if` holds for the ended steps that a step needs."""
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


def _invalid_configuration(faults: list[FieldError]) -> Json:
    detail = "; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults[:5])
    return {"type": "invalid_configuration", "message": f"The configuration of the step is not valid: {detail}"}
