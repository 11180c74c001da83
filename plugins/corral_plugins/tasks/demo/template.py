"""Installs a marketplace template for `corral demo`, starts its agents, and runs its workflow."""

from __future__ import annotations

from typing import Any

from corral.cli.api_client import ApiClient
from corral_plugins.tasks.demo.progress import DemoFailed, ProgressPrinter

ENDS = ("workflow.run.completed", "workflow.run.failed", "workflow.run.cancelled")


class DemoTemplate:
    """Installs and runs a template on the demo's server. The methods raise `DemoFailed` and `ApiClientError`."""

    def __init__(self, remote: ApiClient, teller: ProgressPrinter) -> None:
        self._remote, self._teller = remote, teller

    def run(self, slug: str, until: float) -> dict[str, Any]:
        """Install the template without parameters, run its workflow, and return a summary of the run.

        The workflow receives no input, and nobody answers its questions. The workflows of some templates therefore do
        not complete.
        """
        made = self._remote.post(f"/marketplace/templates/{slug}/install", {})
        names = ", ".join(f"{each['kind']} {each['name']}" for each in made["created"])
        self._teller.step("template", f"{made['slug']} {made['version']}: {names}")
        for each in made["created"]:
            if each["kind"] == "agent":
                self._remote.post(f"/agents/{each['id']}/start", {})
        workflow = next((each for each in made["created"] if each["kind"] == "workflow"), None)
        if workflow is None:
            raise DemoFailed(f"the template {slug} has no workflow to run")
        run = self._remote.post(f"/workflows/{workflow['id']}/run", {})
        for event, data in self._remote.events("workflow_run", run["id"], until=until):
            if event in ("step.started", "step.completed", "step.waiting"):
                self._teller.step("step", f"{data['step']} {event.removeprefix('step.')}")
            elif event in ENDS:
                break
        found = self._remote.get(f"/workflow-runs/{run['id']}")
        self._teller.step("workflow", f"run {found['number']} {found['status']}")
        if found["status"] != "completed":
            raise DemoFailed(f"the workflow of the template {slug} has {found['status']}: {found['error']}")
        return {"slug": slug, "installation_id": made["id"], "status": found["status"], "output": found["output"]}
