"""The action `run_workflow`, which lets a trigger start a run, and the taint check for runs named in events."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid, NotFound
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.triggers.api import FireContext, TaintCheck, TriggerAction
from corral_plugins.workflows.api import RunRequest
from corral_plugins.workflows.models import Run, fetch_tuples
from corral_plugins.workflows.service.definitions import find_readable_workflow
from corral_plugins.workflows.service.run_state import FINAL_RUN
from corral_plugins.workflows.service.runs import RunsService
from corral_plugins.workflows.service.step_types import object_schema

Json = dict[str, Any]
UUID = "^[0-9A-Fa-f]{8}-([0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}$"
SCHEMA = object_schema(
    {"workflow_id": {"type": "string", "pattern": UUID}, "input": {"default": {}}, "context": {"type": "object"}},
    "workflow_id",
)


class WorkflowTriggerAction:
    """Starts runs for triggers. Its service is set after the kernel has booted."""

    runs: RunsService | None

    def definition(self) -> TriggerAction:
        """Return the definition of the action."""
        return TriggerAction(
            type="run_workflow",
            title="Run a workflow",
            schema=SCHEMA,
            example={"workflow_id": "01890a5d-ac96-774b-bcce-b302099a8057", "input": {"event": "{{ event }}"}},
            permission="workflows.run",
            run=self.run,
            check=self.check,
            are_live=self.are_live,
            cancel=self.cancel,
        )

    def check(self, caller: Principal, fields: Json) -> Sequence[str]:
        """Raise `Invalid` if the workflow does not exist, is a template, or rejects an input given as a constant.

        Return a warning if triggers currently cannot run the workflow because it is a draft, is archived, or has no
        steps.
        """
        if "workflow_id" not in fields:
            return ()
        try:
            workflow = find_readable_workflow(str(fields["workflow_id"]).lower(), caller)
        except NotFound:
            detail = "There is no workflow with this id."
            raise Invalid.at("/workflow_id", "unknown_reference", detail, problem="unknown_reference") from None
        if workflow.is_template:
            raise Invalid.at("/workflow_id", "not_allowed", "A template cannot run; clone it first.")
        schema = workflow.config.get("input_schema")
        if schema is not None and "input" in fields:
            faults = json_schema_errors(schema, fields["input"], pointer_prefix="/input")
            if faults:
                raise Invalid("The workflow does not accept this input.", errors=faults)
        if workflow.status == "active" and workflow.steps:
            return ()
        state = "no steps" if workflow.status == "active" else f"the status {workflow.status}"
        remedy = f"corral workflows edit {workflow.id} " + (
            "--input FILE" if not workflow.steps else "-f status=active"
        )
        return (f"The workflow {workflow.name} has {state}, so the trigger fails. Correct it: {remedy}",)

    def run(self, context: FireContext, fields: Json) -> Json:
        """Start a run with the rights of the trigger's owner."""
        assert self.runs is not None
        request = RunRequest(
            workflow_id=fields["workflow_id"].lower(),
            input=fields.get("input", {}),
            context=fields.get("context", {}),
            trigger_type="trigger",
            trigger_id=context.trigger_id,
            tainted=context.tainted,
            cause_chain=context.cause_chain,
        )
        return {"run_id": self.runs.start_run(request, by=context.owner).id}

    def are_live(self, results: Sequence[Json]) -> Sequence[bool]:
        """For each started run, return whether the run is unfinished."""
        ids = [result["run_id"] for result in results if "run_id" in result]
        open_runs = Run.select(Run.id).where(Run.id.in_(ids) & Run.status.not_in(FINAL_RUN))
        live = {row[0] for row in fetch_tuples(open_runs)} if ids else set()
        return [result.get("run_id") in live for result in results]

    def cancel(self, context: FireContext, result: Json) -> None:
        """Cancel a started run. Raise `Conflict` if the trigger has not started a run."""
        assert self.runs is not None
        if "run_id" not in result:
            raise Conflict("The trigger has not started a run, so there is no run to cancel.")
        self.runs.cancel(result["run_id"], reason=f"The trigger {context.trigger_name} replaced the run.")


def find_tainted(ids: Collection[str]) -> dict[str, bool]:
    """For each of these ids that belongs to a run, return whether the run is tainted."""
    found: Any = Run.select(Run.id, Run.tainted).where(Run.id.in_(list(ids))).tuples()
    return dict(found)


TAINT_CHECK = TaintCheck(type="workflow_run", field="run_id", find=find_tainted)
