"""The tasks that do the work of steps. Implements `StepTasks`."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.auth.principal import SYSTEM_PRINCIPAL
from corral.errors import Conflict, NotFound
from corral.events.log import LoggedEvent
from corral_plugins.cost.api import Costs
from corral_plugins.tasks.api import NewTask, Origin, Tasks
from corral_plugins.workflows.api import StepContext, StepFailure, StepResult, StepWait

Json = dict[str, Any]
MIN_SECONDS = 10  # the shortest time limit of a task


class StepTasksService:
    """Creates and cancels the tasks of steps, and turns the outcomes of these tasks into step results."""

    costs: Costs | None

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def create(self, context: StepContext, fields: Json) -> StepWait:
        if not context.caller.may("tasks.write"):
            raise StepFailure("forbidden", "The person who started the run may not create tasks.", retryable=False)
        given: Json = {"title": context.title[:200], **fields}
        optional: Json = {"agent_id": context.agent_id, "retry_policy": context.retry_policy}
        optional["review_policy"] = context.review_policy
        optional["timeout_seconds"] = context.timeout_seconds and max(MIN_SECONDS, context.timeout_seconds)
        given |= {name: value for name, value in optional.items() if value is not None}
        if context.remaining_usd is not None and self.costs is not None:
            given["max_cost_usd"] = min(given.get("max_cost_usd", context.remaining_usd), context.remaining_usd)
        origin = Origin(
            cause_chain=context.cause_chain,
            workflow_run_id=context.run_id,
            step_run_id=context.step_run_id,
            tainted=context.tainted,
        )
        source = {"type": "workflow", "id": context.workflow_id}
        task = self._tasks.create(msgspec.convert(given, NewTask), by=context.caller, source=source, origin=origin)
        return StepWait(waits_for=task.id)

    def resolve(self, context: StepContext, event: LoggedEvent) -> StepResult | None:
        told = event.payload()
        cost = float(told.get("cost_usd") or 0)
        if event.type == "task.completed":
            task = self._tasks.get(event.object_id, by=SYSTEM_PRINCIPAL)
            return StepResult(output=task.result, cost_usd=cost, tainted=task.tainted)
        if event.type == "task.failed":
            error = told.get("error") or {}
            kept = {key: error.get(key) or "error" for key in ("kind", "type", "message")}
            run = self._tasks.find_run(event.object_id)
            return StepResult(status="failed", error=kept, cost_usd=cost, tainted=run is None or run.tainted)
        if event.type in ("task.cancelled", "task.deleted"):
            return StepResult(status="cancelled", cost_usd=cost)
        return None

    def cancel(self, context: StepContext, reason: str | None) -> bool:
        assert context.waits_for is not None
        reason = reason or "The run was cancelled."
        try:
            task = self._tasks.cancel(context.waits_for, by=SYSTEM_PRINCIPAL, reason=reason)
        except (Conflict, NotFound):
            return True
        return bool(task.status == "cancelled")
