"""The changes to single steps while a run is advanced: how steps end, fail, are skipped or are cancelled.

This module does not write to the database. A `Plan` collects the other actions of the transaction that writes the
changes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from corral import clock
from corral_core.expressions.api import TemplateError
from corral_plugins.workflows.api import StepFailure
from corral_plugins.workflows.service.failures import end_attempt
from corral_plugins.workflows.service.graph import Graph, Scope, Step
from corral_plugins.workflows.service.large_outputs import LargeOutputs, is_too_large
from corral_plugins.workflows.service.run_state import RunState, StepRow
from corral_plugins.workflows.service.step_types import StepTypes

Json = dict[str, Any]
Iteration = tuple[int, ...]
BATCH = 200
"""The maximum number of steps that are changed when a run is advanced once, so that the transaction stays short."""
MAX_STEP_RUNS = 10_000
"""Once a run has this many steps, counting each iteration, its loops start no new iterations.

The limit is necessary because all steps of the run are read each time the run is advanced.
"""


class Plan(msgspec.Struct, kw_only=True):
    """The actions of the transaction that advances a run, besides writing the rows.

    `events` are pairs of an event and a row, and `stored` contains the outputs that were stored as files. `is_partial`
    means that more steps could be advanced immediately.
    """

    dispatched: list[tuple[Step, StepRow, Json]] = []
    executed: list[StepRow] = []
    cancelled: list[tuple[Step, StepRow, str]] = []
    aborted: list[str] = []
    events: list[tuple[str, StepRow]] = []
    stored: list[Json] = []
    is_partial: bool = False


class StepChanges:
    """Changes steps of a run in memory, and builds the plan.

    `slots` is the number of additional steps that may run.
    """

    def __init__(
        self, state: RunState, graph: Graph, types: StepTypes, outputs: LargeOutputs, *, max_parallel: int
    ) -> None:
        self.state, self._graph, self._outputs = state, graph, outputs
        self.kinds = {name: kind for name, (_, kind) in types.all().items()}
        self.plan, self.now, self.changed = Plan(), clock.now(), 0
        running = [row for row in state.rows.values() if row.status == "running" and not is_container(row)]
        self.slots = max_parallel - len(running)

    @property
    def is_fail_fast(self) -> bool:
        """Whether a failed step cancels the steps that are still running."""
        return bool(self._graph.config.get("fail_fast"))

    def may_change_more(self) -> bool:
        """Return whether more steps may be changed before the changes are written.

        If not, the run is advanced again immediately after the write.
        """
        if self.changed < BATCH:
            return True
        self.plan.is_partial = True
        return False

    def needs_no_slot(self, step: Step) -> bool:
        """Return whether a step needs no slot because it is carried out by the engine or only waits."""
        kind = self.kinds.get(step.type)
        return kind is None or (kind.execute is None and kind.dispatch is None) or kind.waits

    # -- ends

    def finish(self, row: StepRow, status: str, **changes: Any) -> None:
        """End a step with this status. `changes` contains further columns to change."""
        ended: Json = {"lease": None, "lease_until": None, "event": None, "wake_at": None, "report": None}
        row.set(**ended | {"status": status, "person": False, "finished_at": self.now} | changes)
        if status != "cancelled":
            self.plan.events.append((status, row))

    async def complete(self, step: Step, row: StepRow, output: Any, *, goto: str | None = None) -> None:
        """Complete a step with an output.

        A large output is stored as a file. If the file cannot be stored, the step fails.
        """
        if is_too_large(output):
            try:
                output = await self._outputs.store(self.state.run, row, output)
            except StepFailure as failure:
                row.set(output=None)
                error = {"kind": failure.kind, "type": failure.type, "message": failure.message}
                self.fail(step, row, error, retryable=failure.retryable)
                return
            self.plan.stored.append(output)
        row.set(output=output)
        self.finish(row, "completed", goto=goto, error=None)

    def fail(self, step: Step, row: StepRow, error: Json, *, retryable: bool, is_final: bool = False) -> None:
        """End a failed attempt of a step. If `is_final` is set, the step fails without applying `on_error`."""
        if is_final:
            step = msgspec.structs.replace(step, on_error="fail")
        kind = self.kinds.get(row.type)
        if step.is_container:
            self.cancel_inner_steps(step, tuple(row.iteration))
        end_attempt(step, row, error, retryable=retryable and not (kind is not None and kind.own_retries))
        if row.status == "failed":
            self.plan.events.append(("failed", row))
        elif row.status == "waiting":
            self.plan.events.append(("waiting", row))

    def fail_template(self, step: Step, row: StepRow, error: TemplateError) -> None:
        """Fail a step whose expressions cannot be evaluated."""
        self.fail(step, row, {"type": "template_error", "message": error.detail}, retryable=False)

    def skip(self, step: Step, iteration: Iteration, reason: str) -> StepRow:
        """Skip a step that has not started, and return its row."""
        self.changed += 1
        row = self.state.add(step, iteration, "pending")
        self.finish(row, "skipped", reason=reason)
        return row

    # -- cancelling

    def cancel_with_inner_steps(self, step: Step, row: StepRow, iteration: Iteration) -> None:
        """Cancel a step and all steps inside it."""
        if step.is_container:
            self.cancel_inner_steps(step, iteration)
        self.cancel(step, row)

    def cancel_inner_steps(self, step: Step, iteration: Iteration) -> None:
        """Cancel all steps inside a step."""
        row = self.state.row(step, iteration)
        for scope in step.branches.values():
            self.cancel_scope(scope, iteration)
        if step.body is not None and row is not None:
            for n in range(row.cursor or 0):
                self.cancel_scope(step.body, (*iteration, n))

    def cancel_scope(self, scope: Scope, iteration: Iteration) -> None:
        """Cancel all steps of a scope."""
        for step in scope.steps:
            row = self.state.row(step, iteration)
            if row is not None and row.is_open:
                self.cancel_with_inner_steps(step, row, iteration)

    def cancel(self, step: Step, row: StepRow) -> None:
        """Cancel a step. If the step's work is done elsewhere, the step does not end until that work has ended."""
        if row.reason == "cancelling":
            return
        self.changed += 1
        if row.lease is not None:
            self.plan.aborted.append(row.id)
        if not self.cancel_elsewhere(step, row):
            self.finish(row, "cancelled")

    def cancel_elsewhere(self, step: Step, row: StepRow) -> bool:
        """Cancel the work that is done elsewhere for a step. Return whether there is such work."""
        kind = self.kinds.get(step.type)
        if kind is None or kind.cancel is None or row.waits_for is None or row.reason == "error":
            return False
        row.set(reason="cancelling", wake_at=None)
        self.plan.cancelled.append((step, row, row.waits_for))
        return True


def is_container(row: StepRow) -> bool:
    """Return whether a step consists of other steps."""
    return row.type in ("loop", "parallel")
