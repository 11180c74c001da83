"""The HTTP routes for managing the definitions of workflows and for starting runs."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import NotFound
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.workflows.api import RunRequest
from corral_plugins.workflows.service.definitions import WorkflowStore
from corral_plugins.workflows.service.dry_runs import DryRuns
from corral_plugins.workflows.service.management import WorkflowManagement
from corral_plugins.workflows.service.run_views import RunViews, view_of
from corral_plugins.workflows.service.runs import RunsService
from corral_plugins.workflows.service.step_types import StepTypes
from corral_plugins.workflows.shapes import (
    CloneWorkflow,
    DeleteWorkflowQuery,
    DryRun,
    NewStep,
    NewWorkflow,
    RollBackWorkflow,
    RunItem,
    RunQuery,
    RunView,
    RunWorkflow,
    StepPatch,
    StepTypeList,
    StepTypeView,
    StepView,
    ValidateWorkflow,
    Validation,
    VersionQuery,
    WorkflowItem,
    WorkflowPatch,
    WorkflowQuery,
    WorkflowVersionItem,
    WorkflowVersionView,
    WorkflowView,
)

routes = Routes("/workflows", tag="Workflows")
DEFINITION = ("cycle", "unknown_reference")


@routes.get("/", needs="workflows.read", raises=("invalid_cursor",))
def list_workflows(query: WorkflowQuery, workflows: WorkflowStore, caller: Principal) -> Page[WorkflowItem]:
    """List workflows without their steps."""
    return workflows.list(query, by=caller)


@routes.post("/", needs="workflows.write", status=201, raises=DEFINITION)
async def create_workflow(
    body: NewWorkflow, workflows: WorkflowManagement, caller: Principal, request: Request
) -> Answer[WorkflowView]:
    """Create a workflow. If it is invalid, the response lists all errors in its steps and expressions."""
    view = await workflows.create(body, by=caller, entry=request.unit_context(caller))
    return Answer(body=view, headers={"Location": f"/api/v1/workflows/{view.id}"})


@routes.get("/step-types", needs="workflows.read")
def list_step_types(types: StepTypes) -> StepTypeList:
    """List the step types of all active plugins, with the JSON Schemas of their configurations."""
    return StepTypeList(
        items=[
            StepTypeView(
                type=name,
                title=kind.title,
                plugin=plugin,
                schema=kind.schema,
                output_schema=kind.output_schema,
                waits=kind.waits,
            )
            for name, (plugin, kind) in sorted(types.all().items())
        ]
    )


@routes.get("/{id}", needs="workflows.read", live=True, raises=("not_found",))
def get_workflow(id: str, workflows: WorkflowStore, caller: Principal) -> WorkflowView:
    """Get a workflow with all its steps."""
    return workflows.get(id, by=caller)


@routes.patch(
    "/{id}",
    needs="workflows.write",
    raises=("not_found", "forbidden", "precondition_failed", "overloaded", *DEFINITION),
)
async def update_workflow(
    id: str, body: WorkflowPatch, match: IfMatch, workflows: WorkflowManagement, caller: Principal, request: Request
) -> WorkflowView:
    """Change a workflow. `steps` replaces all steps. Runs keep the definition that they started with."""
    return await workflows.update(id, body, match, by=caller, entry=request.unit_context(caller))


@routes.delete("/{id}", needs="workflows.write", raises=("not_found", "forbidden", "in_use", "precondition_failed"))
def delete_workflow(
    id: str, query: DeleteWorkflowQuery, match: IfMatch, workflows: WorkflowStore, caller: Principal
) -> Answer[None]:
    """Delete a workflow. Its runs stay readable.

    The `Corral-Affected` header contains the number of cancelled runs.
    """
    cancelled = workflows.delete(id, match, force=query.force, by=caller)
    return Answer(body=None, status=204, headers={"Corral-Affected": f"runs={cancelled}"})


@routes.post(
    "/{id}/steps",
    needs="workflows.write",
    status=201,
    raises=("not_found", "forbidden", "duplicate", "overloaded", *DEFINITION),
)
async def create_workflow_step(
    id: str, body: NewStep, workflows: WorkflowManagement, caller: Principal, request: Request
) -> Answer[StepView]:
    """Add a step to a workflow.

    Without `depends_on`, the step runs after all steps with the next lower `order`; steps with the same order run at
    the same time. Without `order`, the step is placed after all other steps.
    """
    step = await workflows.add_step(id, body, by=caller, entry=request.unit_context(caller))
    return Answer(body=step, headers={"Location": f"/api/v1/workflows/{id}"})


@routes.patch(
    "/{id}/steps/{step_id}",
    needs="workflows.write",
    raises=("not_found", "forbidden", "duplicate", "in_use", "precondition_failed", "overloaded", *DEFINITION),
)
async def update_workflow_step(
    id: str,
    step_id: str,
    body: StepPatch,
    match: IfMatch,
    workflows: WorkflowManagement,
    caller: Principal,
    request: Request,
) -> StepView:
    """Change a step of a workflow."""
    return await workflows.update_step(id, step_id, body, match, by=caller, entry=request.unit_context(caller))


@routes.delete(
    "/{id}/steps/{step_id}",
    needs="workflows.write",
    raises=("not_found", "forbidden", "in_use", "precondition_failed", "overloaded", *DEFINITION),
)
async def delete_workflow_step(
    id: str, step_id: str, match: IfMatch, workflows: WorkflowManagement, caller: Principal, request: Request
) -> None:
    """Delete a step of a workflow, unless other steps refer to it."""
    await workflows.delete_step(id, step_id, match, by=caller, entry=request.unit_context(caller))


@routes.post("/{id}/validate", needs="workflows.read", raises=("not_found",))
async def validate_workflow(
    id: str, body: ValidateWorkflow, workflows: WorkflowManagement, caller: Principal
) -> Validation:
    """Check a workflow against the active plugins.

    If an input is given, also check whether the workflow accepts the input.
    """
    return await workflows.validate(id, body, by=caller)


@routes.post("/{id}/clone", needs="workflows.write", status=201, raises=("not_found", "unknown_reference"))
def clone_workflow(id: str, body: CloneWorkflow, workflows: WorkflowStore, caller: Principal) -> Answer[WorkflowView]:
    """Copy a workflow or a workflow template. The caller owns the copy."""
    copy = workflows.clone(id, body, by=caller)
    return Answer(body=copy, headers={"Location": f"/api/v1/workflows/{copy.id}"})


@routes.get("/{id}/versions", needs="workflows.read", raises=("not_found", "invalid_cursor"))
def list_workflow_versions(
    id: str, query: VersionQuery, workflows: WorkflowStore, caller: Principal
) -> Page[WorkflowVersionItem]:
    """List the versions of a workflow, newest first."""
    return workflows.versions(id, query, by=caller)


@routes.get("/{id}/versions/{n}", needs="workflows.read", raises=("not_found",))
def get_workflow_version(id: str, n: str, workflows: WorkflowStore, caller: Principal) -> WorkflowVersionView:
    """Get one version of a workflow with its definition."""
    if not (n.isascii() and n.isdigit() and len(n) < 10):
        raise NotFound("The version must be a number.")
    return workflows.version(id, int(n), by=caller)


@routes.post(
    "/{id}/rollback",
    needs="workflows.write",
    raises=("not_found", "forbidden", "invalid_state", "precondition_failed", "overloaded", *DEFINITION),
)
async def roll_back_workflow(
    id: str, body: RollBackWorkflow, match: IfMatch, workflows: WorkflowManagement, caller: Principal, request: Request
) -> WorkflowView:
    """Roll back a workflow: create a new version with the content of an earlier version."""
    return await workflows.roll_back(id, body.version, match, by=caller, entry=request.unit_context(caller))


@routes.post(
    "/{id}/run",
    needs="workflows.run",
    status=202,
    also=(200,),
    raises=("not_found", "invalid_state", "concurrency_limit", "schema_mismatch", "kill_switch"),
)
async def run_workflow(
    id: str,
    body: RunWorkflow,
    runs: RunsService,
    dry: DryRuns,
    work: Work,
    caller: Principal,
    request: Request,
) -> Answer[RunView | DryRun]:
    """Run a workflow. With `dry_run`, no step is run, and the response contains the plan of the run."""
    if body.dry_run:
        return Answer(body=await dry.plan(id, body.input, by=caller), status=200)
    wanted = RunRequest(workflow_id=id.lower(), input=body.input, context=body.context, tags=body.tags)
    view = await work(lambda: view_of(runs.start_run(wanted, by=caller)), entry=request.unit_context(caller))
    return Answer(body=view, headers={"Location": f"/api/v1/workflow-runs/{view.id}"})


@routes.get("/{id}/runs", needs="workflows.read", raises=("not_found", "invalid_cursor"))
def list_runs_of_workflow(id: str, query: RunQuery, runs: RunViews, caller: Principal) -> Page[RunItem]:
    """List the runs of a workflow, newest first, without their outputs."""
    return runs.list_of_workflow(id, query, by=caller)
