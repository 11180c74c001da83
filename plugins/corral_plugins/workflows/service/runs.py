"""Starts runs, and implements people's actions on runs: cancel, pause, resume, retry, resolve and input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import peewee

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.database.dialect import advisory_lock
from corral.errors import Conflict, Invalid, NotFound, TooMany
from corral.ids import new_id
from corral.plugin import Settings
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.admin.api import KillSwitch
from corral_plugins.workflows.api import RunCreated, RunFacts, RunPaused, RunRequest, RunResumed, RunStatus, StepResult
from corral_plugins.workflows.models import Run, StepRun, Workflow, fetch_tuples
from corral_plugins.workflows.service.definitions import find_readable_workflow
from corral_plugins.workflows.service.engine import ACTIVE, GraphCache, emit_run_event, report_of
from corral_plugins.workflows.service.graph import Graph
from corral_plugins.workflows.service.run_state import FINAL, FINAL_RUN, row_key
from corral_plugins.workflows.service.wakeups import wake
from corral_plugins.workflows.settings import MAX_DEPTH
from corral_plugins.workflows.shapes import ResolveStep, RetryRun, SubmitInput

Json = dict[str, Any]
OPEN = ("queued", *ACTIVE)


def find_readable_run(run_id: str, caller: Principal) -> Run:
    """Return a run if the caller may read it. Otherwise, raise `NotFound`."""
    row: Run | None = Run.get_or_none((Run.id == run_id) & visible(Run, caller))
    if row is None:
        raise NotFound("There is no run with this id.")
    return row


def find_controllable_run(run_id: str, caller: Principal) -> Run:
    """Return a run if the caller started it or owns its workflow. Otherwise, raise `NotFound` or `Forbidden`."""
    run = find_readable_run(run_id, caller)
    owner = Workflow.select(Workflow.created_by).where(Workflow.id == run.workflow_id).tuples().first()
    is_starter = run.started_by is not None and caller.user_id == run.started_by and caller.kind in ("user", "api_key")
    if not is_starter:
        require_owner(caller, owner[0] if owner else None, what="workflow", manage="workflows.manage")
    return run


class RunsService:
    """Implements `Workflows`, and the actions on runs. Every method runs in the caller's unit of work."""

    switch: KillSwitch | None

    def __init__(self, settings: Settings, graphs: GraphCache) -> None:
        self._settings, self._graphs = settings, graphs

    # -- the service for other plugins

    def start(self, request: RunRequest, *, by: Principal) -> RunFacts:
        return facts_of(self.start_run(request, by=by))

    def find_run(self, run_id: str) -> RunFacts | None:
        run = Run.get_or_none(Run.id == run_id)
        return None if run is None else facts_of(run)

    def active_runs(self, *, trigger_id: str) -> list[str]:
        is_active = (Run.trigger_id == trigger_id) & Run.status.in_(OPEN)
        return [row[0] for row in fetch_tuples(Run.select(Run.id).where(is_active).order_by(Run.id).limit(1000))]

    def cancel(self, run_id: str, *, reason: str | None = None) -> None:
        request_cancel(run_id, reason)

    def end_step(self, waits_for: str, result: StepResult) -> bool:
        row = StepRun.get_or_none(StepRun.waits_for == waits_for)
        if row is None or not wake(row.run_id):
            return False
        waits = (StepRun.id == row.id) & StepRun.status.not_in(FINAL) & StepRun.report.is_null()
        return bool(StepRun.update(report=report_of(result), output=result.output).where(waits).execute())

    def exists(self, workflow_id: str) -> bool:
        is_living = (Workflow.id == workflow_id) & Workflow.deleted_at.is_null()
        return bool(Workflow.select(Workflow.id).where(is_living).exists())

    # -- starting

    def start_run(self, request: RunRequest, *, by: Principal) -> Run:
        """Start a run of the current definition of a workflow. See `Workflows.start`."""
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        workflow = find_readable_workflow(request.workflow_id, by)
        self._refuse_unrunnable(workflow, request)
        schema = workflow.config.get("input_schema")
        if schema is not None and (faults := json_schema_errors(schema, request.input, pointer_prefix="/input")):
            raise Invalid("The input does not match the input schema.", code="schema_mismatch", errors=faults)
        self._apply_limit(workflow)
        return self._insert(workflow, workflow.n, request, by)

    def _refuse_unrunnable(self, workflow: Workflow, request: RunRequest) -> None:
        if workflow.is_template:
            detail = "A template cannot run; clone it first."
        elif workflow.status == "archived":
            detail = "An archived workflow cannot run."
        elif workflow.status == "draft" and request.trigger_type not in ("manual", "retry"):
            detail = "A draft can be run only manually."
        elif not workflow.steps:
            detail = "The workflow has no steps."
        elif request.depth > self._settings.get(MAX_DEPTH):
            most = self._settings.get(MAX_DEPTH)
            raise Invalid(f"Workflows can start each other at most {most} levels deep (workflows.max_depth).")
        else:
            return
        raise Conflict(detail, current_status="template" if workflow.is_template else workflow.status)

    def _apply_limit(self, workflow: Workflow) -> None:
        """If the workflow has reached its limit of active runs, refuse the new run or cancel the oldest run.

        Do nothing if runs above the limit are to be queued.
        """
        concurrency = workflow.config.get("concurrency") or {}
        limit, on_limit = concurrency.get("limit"), concurrency.get("on_limit", "queue")
        if limit is None or on_limit == "queue":
            return
        advisory_lock(f"workflows.start:{workflow.id}")
        is_open = (Run.workflow_id == workflow.id) & Run.status.in_(OPEN) & Run.stop.is_null()
        found = [row[0] for row in fetch_tuples(Run.select(Run.id).where(is_open).order_by(Run.id).limit(limit))]
        if len(found) < limit:
            return
        if on_limit == "skip":
            raise TooMany(
                f"The workflow already has {limit} active runs, which is its limit.", code="concurrency_limit"
            )
        request_cancel(found[0], "A newer run replaced this one.")

    def _insert(self, workflow: Workflow, n: int, request: RunRequest, by: Principal, **more: Any) -> Run:
        Workflow.update(runs=Workflow.runs + 1).where(Workflow.id == workflow.id).execute()
        ((number,),) = fetch_tuples(Workflow.select(Workflow.runs).where(Workflow.id == workflow.id))
        run = Run(
            id=new_id(),
            workflow_id=workflow.id,
            n=n,
            number=number,
            status="queued",
            input=request.input,
            context=request.context,
            tags=list(request.tags),
            trigger_type=request.trigger_type,
            trigger_id=request.trigger_id,
            started_by=by.user_id,
            parent_run_id=request.parent_run_id,
            depth=request.depth,
            tainted=request.tainted,
            cause=list(request.cause_chain),
            created_at=clock.now(),
            **more,
        )
        Run.insert(run.__data__).execute()
        Workflow.update(last_run_id=run.id).where(Workflow.id == workflow.id).execute()
        emit_run_event(run, RunCreated)
        wake(run.id)
        return run

    # -- actions

    def cancel_run(self, run_id: str, reason: str | None, *, by: Principal) -> Run:
        """Cancel a run. After the commit, no further step starts, and running steps are stopped."""
        run = find_controllable_run(run_id, by)
        if not request_cancel(run.id, reason):
            raise _wrong_state_error(run_id, "The run has already ended.")
        return find_readable_run(run_id, by)

    def pause_run(self, run_id: str, *, by: Principal) -> Run:
        """Pause a run: steps that are already running may finish, but no new step starts."""
        run = find_controllable_run(run_id, by)
        may_pause = (Run.id == run.id) & Run.status.in_(("running", "waiting")) & (Run.paused == False)  # noqa: E712  (SQL)
        may_pause &= Run.stop.is_null()
        since = peewee.fn.COALESCE(Run.people_since, clock.now())
        if not Run.update(paused=True, status="paused", people_since=since).where(may_pause).execute():
            raise _wrong_state_error(run_id, "Only a run that is running or waiting can be paused.")
        wake(run.id)
        found = find_readable_run(run_id, by)
        emit_run_event(found, RunPaused)
        return found

    def resume_run(self, run_id: str, *, by: Principal) -> Run:
        """Resume a paused run."""
        run = find_controllable_run(run_id, by)
        is_paused = (Run.id == run.id) & (Run.status == "paused")
        if not Run.update(paused=False, status="running").where(is_paused).execute():
            raise _wrong_state_error(run_id, "The run is not paused.")
        wake(run.id)
        found = find_readable_run(run_id, by)
        emit_run_event(found, RunResumed)
        return found

    def resolve_step(self, run_id: str, name: str, body: ResolveStep, *, by: Principal) -> Run:
        """Decide how to continue a run after the failure of a step whose `on_error` is `pause`."""
        run = find_controllable_run(run_id, by)
        reports: dict[str, Json] = {
            "retry": {"status": "ready"},
            "skip": {"status": "skipped", "reason": "resolved"},
            "abort": {"status": "failed", "is_final": True},
        }
        report = reports[body.action]
        row = self._find_step(run, name, body.iteration)
        if body.action == "abort":
            report["error"] = row.error or {"type": "aborted", "message": "A person ended the step."}
        self._store_report(run, row, report, body.output if body.action == "skip" else None, StepRun.reason == "error")
        return find_readable_run(run_id, by)

    def submit_input(self, run_id: str, name: str, body: SubmitInput, *, by: Principal) -> Run:
        """Submit the data that a step of the type `input` waits for.

        Raise `Invalid` with the code `schema_mismatch` if the data does not match the schema of the step.
        """
        run = find_readable_run(run_id, by)
        row = self._find_step(run, name, body.iteration)
        if row.type != "input":
            raise _not_waiting_error(row)
        config = row.input or {}
        assignees = config.get("assignees") or []
        if assignees and by.user_id not in assignees and not by.is_admin:
            raise Conflict(
                "Only the assignees of the step and admins may submit this input.", current_status=row.status
            )
        schema = config.get("schema")
        if schema is not None and (faults := json_schema_errors(schema, body.input, pointer_prefix="/input")):
            raise Invalid("The input does not match the schema of the step.", code="schema_mismatch", errors=faults)
        self._store_report(run, row, {"status": "completed"}, body.input, StepRun.reason.is_null())
        return find_readable_run(run_id, by)

    def _find_step(self, run: Run, name: str, iteration: Sequence[int]) -> StepRun:
        key = row_key(name, iteration)
        row: StepRun | None = StepRun.get_or_none((StepRun.run_id == run.id) & (StepRun.key == key))
        if row is not None:
            return row
        if name in self._graphs.read(run.workflow_id, run.n).steps:
            raise Conflict("The run has not reached this step.", current_status="pending")
        raise NotFound("The run has no step with this name.")

    def _store_report(self, run: Run, row: StepRun, report: Json, output: Any, guard: Any) -> None:
        if run.status in FINAL_RUN:
            raise Conflict("The run has already ended.", current_status=run.status)
        wake(run.id)
        waits = (StepRun.id == row.id) & (StepRun.status == "waiting") & StepRun.report.is_null() & guard
        if not StepRun.update(report=report, output=output).where(waits).execute():
            raise _not_waiting_error(row)

    # -- retry

    def retry_run(self, run_id: str, body: RetryRun, *, by: Principal) -> Run:
        """Start a new run that repeats an ended run, and reuse the outputs of the steps that need not run again.

        Raise `Conflict` if the run has not ended or has no failed step to start from, or if the workflow cannot run.
        Raise `Invalid` if the step to start from does not exist.
        """
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        old = find_readable_run(run_id, by)
        if old.status not in FINAL_RUN:
            raise Conflict("Only a run that has ended can be retried.", current_status=old.status)
        workflow = find_readable_workflow(old.workflow_id, by)
        n = old.n if body.definition == "original" else workflow.n
        graph = self._graphs.read(workflow.id, n)
        kept = [] if body.start == "start" else self._reusable_outputs(old, graph, body.start)
        request = RunRequest(
            workflow_id=workflow.id,
            input=old.input,
            context=old.context,
            tags=old.tags,
            trigger_type="retry",
            trigger_id=old.id,
            tainted=old.tainted,
            cause_chain=tuple(old.cause),
        )
        self._refuse_unrunnable(workflow, request)
        self._apply_limit(workflow)
        run = self._insert(workflow, n, request, by, retry_of=old.id)
        if kept:
            StepRun.insert_many([_reused_columns(row, run.id) for row in kept]).execute()
        return run

    def _reusable_outputs(self, old: Run, graph: Graph, start: str) -> list[StepRun]:
        """Return the steps of an ended run whose outputs a repeated run can use."""
        same = (StepRun.run_id == old.id) & StepRun.key.in_([*graph.root.by_name])
        rows = {row.name: row for row in StepRun.select().where(same)}
        root = graph.root
        if start == "failed":
            ended = ("failed", "cancelled")
            again = {name for name in root.by_name if name in rows and rows[name].status in ended}
            if not again and old.status == "completed":
                raise Conflict("No step of the run failed; retry the run from the start.", current_status=old.status)
        elif start in root.by_name:
            again = {start}
        else:
            detail = f"The workflow has no step named {start}."
            raise Invalid.at("/from", "unknown_reference", detail, problem="unknown_reference")
        again = root.descendants(again)
        return [
            rows[name]
            for name, step in root.by_name.items()
            if name not in again and name in rows and rows[name].status == "completed" and rows[name].type == step.type
        ]


def request_cancel(run_id: str, reason: str | None) -> bool:
    """Request the cancellation of a run. Return False if the run has ended."""
    stop = {"kind": "cancel", "type": "cancelled", "message": reason}
    is_open = (Run.id == run_id) & Run.status.in_(OPEN) & Run.stop.is_null()
    if Run.update(stop=stop, cancel_requested_at=clock.now()).where(is_open).execute():
        return wake(run_id)
    return bool(Run.select(Run.id).where((Run.id == run_id) & Run.status.in_(OPEN)).exists())


def facts_of(run: Run) -> RunFacts:
    """Return the state of a run in the form that other plugins receive."""
    return RunFacts(
        id=run.id,
        workflow_id=run.workflow_id,
        status=cast(RunStatus, run.status),
        output=run.output,
        error=run.error,
        cost_usd=run.cost_micro / 1e6,
        tainted=run.tainted,
        cause_chain=tuple(run.cause),
    )


def _reused_columns(row: StepRun, run_id: str) -> Json:
    same = ("key", "name", "iteration", "type", "input", "output", "goto", "attempt", "started_at", "finished_at")
    kept = {name: getattr(row, name) for name in same}
    return {**kept, "id": new_id(), "run_id": run_id, "status": "completed", "reused": True, "created_at": clock.now()}


def _not_waiting_error(row: StepRun) -> Conflict:
    return Conflict(f"The step {row.name} is not waiting for this input.", current_status=row.status)


def _wrong_state_error(run_id: str, detail: str) -> Conflict:
    run = Run.get_by_id(run_id)
    return Conflict(detail, current_status=run.status)
