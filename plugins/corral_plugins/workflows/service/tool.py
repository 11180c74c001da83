"""The tool `workflows.run`, which lets an agent start a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.errors import NotFound
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import Tool, ToolContext, ToolFailure
from corral_plugins.workflows.api import RunRequest
from corral_plugins.workflows.service.runs import RunsService
from corral_plugins.workflows.service.step_types import object_schema

Json = dict[str, Any]
UUID = {"type": "string", "format": "uuid"}
SCHEMA = object_schema({"workflow_id": {**UUID, "description": "The workflow to run."}, "input": {}}, "workflow_id")
CONFIG = object_schema({"workflow_ids": {"type": "array", "items": UUID, "maxItems": 100}})


class WorkflowTool:
    """Starts runs for agents, with the rights of the person who requested the agent's task."""

    runs: RunsService | None
    accounts: Accounts | None
    tasks: Tasks | None

    def definition(self) -> Tool:
        """Return the definition of the tool."""
        return Tool(
            name="workflows.run",
            title="Run a workflow",
            description="Start a workflow run with the given input, and return the id and the status of the run.",
            risk="external",
            schema=SCHEMA,
            permission="workflows.run",
            config_schema=CONFIG,
            admits=_is_workflow_allowed,
            run=self.run,
        )

    def run(self, context: ToolContext, arguments: Json) -> Json:
        """Start a run. The method runs in the unit of work that stores the result of the tool call."""
        assert self.runs is not None
        assert self.accounts is not None
        assert self.tasks is not None
        try:
            caller = self.accounts.principal_of(context.caller.user_id, "workflows.run")
        except InsufficientRights as lost:
            raise ToolFailure("forbidden", lost.detail) from None
        task = self.tasks.find_run(context.task_id)
        request = RunRequest(
            workflow_id=arguments["workflow_id"].lower(),
            input=arguments.get("input", {}),
            trigger_type="agent",
            trigger_id=context.caller.agent_id,
            tainted=task is not None and task.tainted,
            cause_chain=(*(task.cause_chain if task is not None else ()), context.task_id),
        )
        try:
            run = self.runs.start_run(request, by=caller)
        except NotFound as error:
            raise ToolFailure("not_found", error.detail) from None
        return {"run_id": run.id, "status": run.status}


def _is_workflow_allowed(config: Mapping[str, Any], arguments: Json) -> bool:
    """Return whether the tool's configuration allows the agent to run the requested workflow."""
    allowed = config.get("workflow_ids")
    return allowed is None or arguments["workflow_id"].lower() in [each.lower() for each in allowed]
