"""The workflow that `corral demo` creates and runs.

A trigger starts the workflow when the task is completed. The workflow asks a person for approval.
"""

from __future__ import annotations

from typing import Any

from corral.cli.api_client import ApiClient
from corral_plugins.tasks.demo.progress import DemoFailed, ProgressPrinter

WORKFLOW: dict[str, Any] = {
    "name": "Publish a summary",
    "description": "Publishes the summary that a task has written, if a person approves it.",
    "config": {"output": "{{ steps.publish.output }}"},
    "steps": [
        {
            "name": "review",
            "step_type": "approval",
            "config": {"title": "Publish this summary?", "payload": {"summary": "{{ input.summary }}"}},
        },
        {
            "name": "publish",
            "step_type": "transform",
            "config": {
                "value": {
                    "text": "{{ steps.review.output.payload.summary }}",
                    "approved_by": "{{ steps.review.output.by }}",
                }
            },
        },
    ],
}


class DemoFlow:
    """A workflow and its trigger on the demo's server. The methods raise `DemoFailed` and `ApiClientError`."""

    def __init__(self, remote: ApiClient, teller: ProgressPrinter) -> None:
        self._remote, self._teller = remote, teller
        self._trigger_id = ""

    def create(self, agent_id: str) -> None:
        """Create the workflow, and the trigger that starts it when the agent completes a task."""
        workflow = self._remote.post("/workflows/", WORKFLOW)
        steps = ", ".join(f"{step['name']} ({step['step_type']})" for step in WORKFLOW["steps"])
        self._teller.step("workflow", f"{workflow['name']}: {steps}")
        trigger = self._remote.post(
            "/triggers",
            {
                "name": "After each summary",
                "type": "event",
                "config": {"event": "task.completed"},
                "filter": f"payload.agent_id == '{agent_id}'",
                "action": {
                    "type": "run_workflow",
                    "workflow_id": workflow["id"],
                    "input": {"summary": "{{ payload.result_summary }}"},
                },
            },
        )
        self._trigger_id = trigger["id"]
        self._teller.step("trigger", f"{trigger['name']}: runs the workflow when the agent completes a task")

    def follow(self, until: float, *, person: str) -> dict[str, Any]:
        """Wait for the trigger, approve the run's approval request as `person`, and return a summary of the run."""
        run_id = self._wait_for_fire(until)
        for event, data in self._remote.events("workflow_run", run_id, until=until):
            if event == "step.waiting":
                self._approve(run_id, person)
            elif event == "workflow.run.completed":
                break
            elif event in ("workflow.run.failed", "workflow.run.cancelled"):
                raise DemoFailed(f"the run of the workflow has {data['status']}: {data.get('error')}")
        run = self._remote.get(f"/workflow-runs/{run_id}")
        self._teller.step("workflow", f"run {run['number']} completed")
        return {
            "status": run["status"],
            "run_id": run_id,
            "trigger_id": self._trigger_id,
            "steps": {step["name"]: step["status"] for step in run["steps"]},
            "output": run["output"],
        }

    def _wait_for_fire(self, until: float) -> str:
        """Wait until the trigger fires, and return the id of the run that it starts."""
        for event, data in self._remote.events("trigger", self._trigger_id, until=until):
            if event == "trigger.fired":
                self._teller.step("trigger", f"{data['name']} has fired and started the workflow")
                return str(data["result"]["run_id"])
            if event in ("trigger.failed", "trigger.disabled"):
                raise DemoFailed(f"the trigger did not start the workflow: {data.get('error') or data.get('reason')}")
        raise AssertionError("the event stream ended unexpectedly")

    def _approve(self, run_id: str, person: str) -> None:
        (asked,) = self._remote.get("/approvals", run_id=run_id)["items"]
        self._teller.step("approval", f"{asked['title']}  The run waits for a person")
        self._remote.post(f"/approvals/{asked['id']}/approve", {"payload_sha256": asked["payload_sha256"]})
        self._teller.step("approval", f"approved by the demo as {person}")
