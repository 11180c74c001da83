"""The HTTP routes for workflow runs."""

from __future__ import annotations

from corral import clock
from corral.auth.principal import Principal
from corral.events.log import EventView
from corral.http.answers import Answer, Request, Stream, Wait
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.workflows.service.run_events import RunEvents
from corral_plugins.workflows.service.run_state import FINAL_RUN
from corral_plugins.workflows.service.run_views import RunViews, view_of
from corral_plugins.workflows.service.runs import RunsService
from corral_plugins.workflows.shapes import (
    AllRunsQuery,
    CancelRun,
    GetRunQuery,
    ResolveStep,
    RetryRun,
    RunEventQuery,
    RunItem,
    RunView,
    SubmitInput,
)

routes = Routes("/workflow-runs", tag="Workflows")
ACTION = ("not_found", "forbidden", "invalid_state")


@routes.get("/", needs="workflows.read", raises=("invalid_cursor",))
def list_workflow_runs(query: AllRunsQuery, runs: RunViews, caller: Principal) -> Page[RunItem]:
    """List the runs of all workflows, newest first, without their outputs."""
    return runs.list(query, by=caller)


@routes.get("/{id}", needs="workflows.read", live=True, seconds=60.0, raises=("not_found",))
def get_workflow_run(id: str, query: GetRunQuery, runs: RunViews, caller: Principal) -> RunView | Wait:
    """Get a run with its steps.

    With `wait`, the response is delayed until the run has ended, but for no longer than `wait` seconds.
    """
    run = runs.get(id, by=caller)
    if query.wait and run.status not in FINAL_RUN and clock.time_s() < query.poll_deadline:
        return Wait((run.id,), query.poll_deadline)
    return run


@routes.get("/{id}/events", needs="workflows.read", seconds=60.0, raises=("not_found", "cursor_expired"))
async def list_workflow_run_events(
    id: str, query: RunEventQuery, events: RunEvents, caller: Principal, request: Request
) -> Page[EventView] | Stream:
    """List the events of a run, oldest first, or stream them as server-sent events.

    For a stream, send `Accept: text/event-stream`. The stream ends when the run ends, and after 30 seconds at the
    latest. To receive later events, reconnect with the last `id` as `Last-Event-ID`. In a list, `next` is the position
    from which to continue.
    """
    cursor = request.header("last-event-id") or (query.after if isinstance(query.after, str) else None)
    if "text/event-stream" in (request.header("accept") or ""):
        chunks = await events.stream(id, cursor, by=caller)
        return Stream(chunks, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    return await events.list(id, cursor, query.limit, by=caller)


@routes.post("/{id}/cancel", needs="workflows.run", also=(202,), raises=ACTION)
def cancel_workflow_run(id: str, body: CancelRun, runs: RunsService, caller: Principal) -> Answer[RunView]:
    """Cancel a run. No step starts after the response has been sent.

    The status is 202 if running steps are still being stopped.
    """
    run = view_of(runs.cancel_run(id, body.reason, by=caller))
    return Answer(body=run, status=200 if run.status in FINAL_RUN else 202)


@routes.post("/{id}/pause", needs="workflows.run", raises=ACTION)
def pause_workflow_run(id: str, runs: RunsService, caller: Principal) -> RunView:
    """Pause a run. Steps that are already running may finish, but no new step starts."""
    return view_of(runs.pause_run(id, by=caller))


@routes.post("/{id}/resume", needs="workflows.run", raises=ACTION)
def resume_workflow_run(id: str, runs: RunsService, caller: Principal) -> RunView:
    """Resume a paused run."""
    return view_of(runs.resume_run(id, by=caller))


@routes.post(
    "/{id}/retry", needs="workflows.run", status=202, raises=("not_found", "invalid_state", "unknown_reference")
)
def retry_workflow_run(id: str, body: RetryRun, runs: RunsService, caller: Principal) -> Answer[RunView]:
    """Repeat an ended run as a new run.

    If the new run begins at the failed steps or at a given step, it reuses the outputs of all steps that need not run
    again. `definition` selects either the original run's definition or the current definition.
    """
    run = view_of(runs.retry_run(id, body, by=caller))
    return Answer(body=run, headers={"Location": f"/api/v1/workflow-runs/{run.id}"})


@routes.post("/{id}/steps/{name}/resolve", needs="workflows.run", raises=ACTION)
def resolve_workflow_step(id: str, name: str, body: ResolveStep, runs: RunsService, caller: Principal) -> RunView:
    """Decide how to continue a run that is paused because a step failed: repeat the step, skip it, or end the run."""
    return view_of(runs.resolve_step(id, name, body, by=caller))


@routes.post(
    "/{id}/steps/{name}/input", needs="workflows.run", raises=("not_found", "invalid_state", "schema_mismatch")
)
def submit_workflow_input(id: str, name: str, body: SubmitInput, runs: RunsService, caller: Principal) -> RunView:
    """Submit the data that a step of the type `input` asks for."""
    return view_of(runs.submit_input(id, name, body, by=caller))
