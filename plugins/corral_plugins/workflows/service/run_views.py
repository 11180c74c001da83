"""Lists runs, and builds their API representations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.http.page import Page, newest_first, paginate
from corral_plugins.workflows.api import RunStatus, StepStatus
from corral_plugins.workflows.models import Run, StepRun, WorkflowVersion
from corral_plugins.workflows.service.definitions import find_readable_workflow, find_version, step_views
from corral_plugins.workflows.service.runs import find_readable_run
from corral_plugins.workflows.shapes import (
    AllRunsQuery,
    Definition,
    RunItem,
    RunQuery,
    RunView,
    StepAttemptView,
    StepRunView,
    Trigger,
)

Json = dict[str, Any]
MAX_STEPS = 1000
TASKS = ("agent", "code", "tool")  # the step types whose work is a task
LIST_COLUMNS = (
    Run.id,
    Run.workflow_id,
    Run.n,
    Run.number,
    Run.status,
    Run.tags,
    Run.trigger_type,
    Run.trigger_id,
    Run.started_by,
    Run.retry_of,
    Run.parent_run_id,
    Run.depth,
    Run.error,
    Run.cost_micro,
    Run.cancel_requested_at,
    Run.created_at,
    Run.started_at,
    Run.finished_at,
)


class RunViews:
    """Reads runs. Every method runs in the caller's unit of work."""

    def list(self, query: AllRunsQuery, *, by: Principal) -> Page[RunItem]:
        """Return a page of the runs that match every filter, from all workflows, newest first."""
        where = (
            [] if query.workflow_id is UNSET else [Run.workflow_id.in_([each.lower() for each in query.workflow_id])]
        )
        return self._page(query, where, "workflow_runs", by)

    def list_of_workflow(self, workflow_id: str, query: RunQuery, *, by: Principal) -> Page[RunItem]:
        """Return a page of those runs of a workflow that match every filter, newest first."""
        find_readable_workflow(workflow_id, by)
        return self._page(query, [Run.workflow_id == workflow_id], f"workflow_runs:{workflow_id}", by)

    def _page(self, query: RunQuery, where: Sequence[Any], scope: str, by: Principal) -> Page[RunItem]:
        found = [*where, visible(Run, by)]
        if query.status is not UNSET:
            found.append(Run.status.in_(query.status))
        if query.trigger_id is not UNSET:
            found.append(Run.trigger_id.in_([each.lower() for each in query.trigger_id]))
        if query.since is not UNSET:
            found.append(Run.created_at >= clock.from_datetime(query.since))
        rows = Run.select(*LIST_COLUMNS).where(*found)
        return paginate(rows, query, by, scope=scope, order=newest_first(Run), make=_item)

    def get(self, run_id: str, *, by: Principal) -> RunView:
        """Return a run with its steps. Raise `NotFound` if the caller may not read the run."""
        return view_of(find_readable_run(run_id, by))


def view_of(run: Run) -> RunView:
    """Return the API representation of a run. Until the run ends, steps that it has not reached are `pending`."""
    version = find_version(run.workflow_id, run.n)
    same = StepRun.run_id == run.id
    rows = list(StepRun.select().where(same).order_by(StepRun.id).limit(MAX_STEPS))
    count = len(rows) if len(rows) < MAX_STEPS else int(StepRun.select().where(same).count())
    reached = {row.name for row in rows}
    pending = [] if run.finished_at else [step for step in version.steps if step["name"] not in reached]
    steps = [_step_view(row) for row in rows] + [_pending_view(step) for step in pending]
    return RunView(
        **_item_fields(run),
        definition=_definition(version),
        input=run.input,
        output=run.output,
        context=run.context,
        current_steps=_current_steps(rows),
        steps=steps[:MAX_STEPS],
        step_count=max(count, len(steps)),
    )


def _definition(version: WorkflowVersion) -> Definition:
    return Definition(name=version.name, config=version.config, steps=step_views(version.steps))


def _current_steps(rows: Sequence[StepRun]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows if row.status in ("ready", "running", "waiting")))


def _item(run: Run) -> RunItem:
    return RunItem(**_item_fields(run))


def _item_fields(run: Run) -> Json:
    same = ("id", "workflow_id", "number", "tags", "started_by", "retry_of", "parent_run_id", "depth", "error")
    times = ("cancel_requested_at", "created_at", "started_at", "finished_at")
    fields = {name: getattr(run, name) for name in (*same, *times)}
    fields |= {"workflow_version": run.n, "status": cast(RunStatus, run.status), "cost_usd": run.cost_micro / 1e6}
    return {**fields, "trigger": Trigger(type=run.trigger_type, id=run.trigger_id)}


def _step_view(row: StepRun) -> StepRunView:
    return StepRunView(
        id=row.id,
        name=row.name,
        step_type=row.type,
        iteration=row.iteration,
        status=cast(StepStatus, row.status),
        reason=row.reason,
        input=row.input,
        output=row.output,
        error=row.error,
        task_id=row.waits_for if row.type in TASKS else None,
        approval_id=row.waits_for if row.type == "approval" else None,
        child_run_id=row.waits_for if row.type == "workflow" else None,
        attempt=row.attempt,
        attempts=[StepAttemptView(**attempt) for attempt in row.attempts],
        reused=row.reused,
        cost_usd=row.cost_micro / 1e6,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def _pending_view(step: Json) -> StepRunView:
    return StepRunView(
        id=None,
        name=step["name"],
        step_type=step["step_type"],
        iteration=[],
        status="pending",
        reason=None,
        input=None,
        output=None,
        error=None,
        task_id=None,
        approval_id=None,
        child_run_id=None,
        attempt=1,
        attempts=[],
        reused=False,
        cost_usd=0.0,
        started_at=None,
        finished_at=None,
    )
