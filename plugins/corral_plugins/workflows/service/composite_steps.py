"""Advances composite steps: loops and parallel steps, which consist of other steps."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from msgspec import UNSET

from corral_core.expressions.api import TemplateError
from corral_plugins.workflows.service.graph import Scope, Step
from corral_plugins.workflows.service.rendering import Rendering
from corral_plugins.workflows.service.run_state import StepRow
from corral_plugins.workflows.service.step_changes import BATCH, MAX_STEP_RUNS, Iteration, Json, StepChanges

CANCELLED = {"kind": "error", "type": "cancelled", "message": "The steps were cancelled."}


class ScopeEnd(msgspec.Struct, kw_only=True):
    """The result of a scope, which is a group of steps.

    `error` is the error of the first failed step; `last` is the last completed step.
    """

    error: Json | None = None
    last: StepRow | None = None


class ScopeAdvancer(Protocol):
    """Advances scopes of steps: the body of a loop, or the branches of a parallel step."""

    async def advance_scope(self, scope: Scope, iteration: Iteration, *, closing: bool = False) -> ScopeEnd | None:
        """Advance the steps of a scope. Return the result of the scope, or None if it is still running.

        If `closing` is set, the result of the scope is no longer needed.
        """
        ...

    def first_failure(self, scope: Scope, iteration: Iteration) -> StepRow | None:
        """Return the first step of a scope whose failure ends the scope, or None if there is no such step."""
        ...


class CompositeSteps:
    """Advances the loops and the parallel steps of a run."""

    def __init__(self, changes: StepChanges, rendering: Rendering, scopes: ScopeAdvancer) -> None:
        self._changes, self._rendering, self._scopes, self._run = changes, rendering, scopes, changes.state.run

    async def advance(self, step: Step, row: StepRow, iteration: Iteration, *, is_ending: bool) -> None:
        """Advance the steps inside a loop or a parallel step.

        If `is_ending` is set, the results of the inner steps are no longer needed.
        """
        if step.type == "loop":
            if row.cursor is None:
                row.set(cursor=0)
            await self._advance_loop(step, row, iteration, is_ending=is_ending)
        else:
            await self._advance_parallel(step, row, iteration, is_ending=is_ending)

    # -- loops

    async def _advance_loop(self, step: Step, row: StepRow, iteration: Iteration, *, is_ending: bool) -> None:
        assert step.body is not None
        items = await self._rendering.items(row)
        active, collects = 0, step.config.get("on_item_error") == "collect"
        started = range(row.cursor or 0)
        failures = (self._scopes.first_failure(step.body, (*iteration, n)) for n in started)
        is_closing = is_ending or (not collects and any(each is not None for each in failures))
        failed: Json | None = None
        ends: list[ScopeEnd | None] = []
        for n in started:
            end = await self._scopes.advance_scope(step.body, (*iteration, n), closing=is_closing)
            ends.append(end)
            active += end is None
            if end is not None and end.error is not None and end.error != CANCELLED and not collects:
                failed = failed or {**end.error, "message": f"Iteration {n}: {end.error.get('message', '')}"}
        limit = step.config.get("concurrency", 1) if items is not None else 1
        may_begin = failed is None and not is_closing and not self._run.paused
        while may_begin and failed is None and active < limit and self._changes.may_change_more():
            n = row.cursor or 0
            if not await self._has_next(step, row, iteration, items, n):
                break
            row.set(cursor=n + 1)
            self._changes.changed += 1
            end = await self._scopes.advance_scope(step.body, (*iteration, n))
            ends.append(end)
            active += end is None
            if end is not None and end.error is not None and not collects:
                failed = {**end.error, "message": f"Iteration {n}: {end.error.get('message', '')}"}
        if active or not row.is_open:
            return
        if failed is not None:
            self._changes.fail(step, row, {"kind": "error", **failed}, retryable=False)
            return
        if is_ending:
            self._changes.finish(row, "cancelled")
            return
        total = len(items) if items is not None else None
        if (total is None and self._changes.changed < BATCH and not self._run.paused) or row.cursor == total:
            await self._complete_loop(step, row, ends)

    async def _has_next(self, step: Step, row: StepRow, iteration: Iteration, items: list[Any] | None, n: int) -> bool:
        """Return whether a loop has an iteration `n`.

        The loop fails if it needs more iterations than its limit allows, or if the run has reached the maximum number
        of steps.
        """
        most = step.config.get("max_iterations", 100)
        try:
            more = n < len(items) if items is not None else await self._rendering.loop_continues(step, iteration, n)
        except TemplateError as error:
            self._changes.fail_template(step, row, error)
            return False
        if more and n >= most:
            fault = {"type": "max_iterations", "message": f"The loop needs more than {most} iterations."}
            self._changes.fail(step, row, fault, retryable=False)
            return False
        if more and len(self._changes.state.rows) >= MAX_STEP_RUNS:
            message = f"The run has reached {MAX_STEP_RUNS} steps; let its loops start other workflows."
            self._changes.fail(step, row, {"type": "max_steps", "message": message}, retryable=False)
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
        results = [None if last is None else output_of(last) for last in lasts]
        await self._changes.complete(step, row, {"results": results, "errors": errors})

    # -- parallel branches

    async def _advance_parallel(self, step: Step, row: StepRow, iteration: Iteration, *, is_ending: bool) -> None:
        join, total = step.config.get("join", "all"), len(step.branches)
        needed = min(join, total) if isinstance(join, int) else 1 if join == "any" else total
        ends: dict[str, ScopeEnd | None] = {}
        for name, scope in step.branches.items():
            ends[name] = await self._scopes.advance_scope(scope, iteration, closing=is_ending)
        done = [name for name, end in ends.items() if end is not None and end.error is None]
        failures = [end.error for end in ends.values() if end is not None and end.error is not None]
        is_decided = len(done) >= needed or len(failures) > total - needed
        if is_decided and len(done) >= needed:
            self._cancel_open_branches(step, ends, iteration)
        if is_decided or is_ending:
            for name, scope in step.branches.items():
                ends[name] = ends[name] or await self._scopes.advance_scope(scope, iteration, closing=True)
        if any(end is None for end in ends.values()):
            return
        if len(done) >= needed:
            lasts = {name: end.last for name, end in ends.items() if end is not None and name in done}
            await self._rendering.load(last for last in lasts.values() if last is not None)
            found = {name: lasts.get(name) for name in step.branches}
            await self._changes.complete(step, row, {name: last and output_of(last) for name, last in found.items()})
        elif is_ending:
            self._changes.finish(row, "cancelled")
        else:
            self._changes.fail(step, row, {"kind": "error", **failures[0]}, retryable=False)

    def _cancel_open_branches(self, step: Step, ends: dict[str, ScopeEnd | None], iteration: Iteration) -> None:
        for name, scope in step.branches.items():
            if ends[name] is None:
                self._changes.cancel_scope(scope, iteration)


def output_of(row: StepRow) -> Any:
    """Return the output of a step. The step's inputs and outputs must already have been read."""
    return None if row.output is UNSET else row.output
