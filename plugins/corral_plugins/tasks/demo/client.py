"""The client side of `corral demo`, which uses only the public HTTP API of the demo's server."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from corral.cli.api_client import ApiClient, ApiClientError, TextDeltaTracker
from corral_plugins.tasks.demo.model_choice import NEW_TOKENS, WITHOUT_MODEL, ModelChoice
from corral_plugins.tasks.demo.progress import DemoFailed, ProgressPrinter
from corral_plugins.tasks.demo.template import DemoTemplate
from corral_plugins.tasks.demo.workflow import DemoFlow

TERMINAL = ("task.completed", "task.failed", "task.cancelled")


class DemoClient:
    """A client that acts as a user of the server at `address`. Its methods raise `DemoFailed` and `ApiClientError`."""

    def __init__(self, address: str, teller: ProgressPrinter) -> None:
        self._remote, self._teller = ApiClient(address), teller
        self._live = TextDeltaTracker()
        self._flow = DemoFlow(self._remote, teller)
        self._email = ""

    def wait_until_ready(self, server: subprocess.Popen[bytes], seconds: float) -> None:
        """Wait until the server is ready.

        Raise `DemoFailed` if the process has exited or is not ready within `seconds`.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if server.poll() is not None:
                raise DemoFailed(f"the server ended with status {server.returncode}")
            try:
                self._remote.get("/health/ready")
                return
            except ApiClientError:
                time.sleep(0.05)
        raise DemoFailed(f"the server was not ready within {seconds:g} s")

    def sign_in(self, email: str, password: str) -> None:
        """Sign in with a password. Later requests send the access token."""
        tokens = self._remote.post("/auth/login", {"email": email, "password": password})
        self._remote.set_token(tokens["access_token"])
        self._email = email

    def run_task(self, text: str, choice: ModelChoice, seconds: float, *, strict: bool) -> dict[str, Any]:
        """Run a task and the workflow that a trigger starts when the task is completed. Return a summary of both.

        Unless `strict` is set, the agent falls back to the scripted model if the chosen model fails.
        """
        until = time.monotonic() + seconds
        self._wait_for_worker(until)
        agent = self._create_agent(choice, strict=strict)
        self._flow.create(agent["id"])
        task = self._remote.post(
            "/tasks",
            {
                "title": "Summarise the notes",
                "agent_id": agent["id"],
                "instructions": f"{text}\n\nSummarise these notes in three sentences.",
            },
        )
        self._teller.step("task", f"{task['title']}  {task['id']}")
        began = time.monotonic()
        with self._remote.waiting_out_outages(lambda reason: None, until=until):
            for event, data in self._remote.events("task", task["id"], until=until):
                self._report_event(event, data)
                if event in TERMINAL:
                    break
            outcome = self._task_outcome(task["id"], began)
            if outcome["status"] == "completed":
                outcome["workflow"] = self._flow.follow(until, person=self._email)
        return outcome

    def check_template(self, slug: str) -> None:
        """Raise `DemoFailed` if the server has no template with this slug."""
        slugs = sorted(each["slug"] for each in self._remote.pages("/marketplace/templates"))
        if slug not in slugs:
            raise DemoFailed(f"there is no template {slug}; choose one of {', '.join(slugs)}")

    def run_template(self, slug: str, seconds: float) -> dict[str, Any]:
        """Install a template, run its workflow, and return a summary."""
        until = time.monotonic() + seconds
        with self._remote.waiting_out_outages(lambda reason: None, until=until):
            return DemoTemplate(self._remote, self._teller).run(slug, until)

    def _create_agent(self, choice: ModelChoice, *, strict: bool) -> dict[str, Any]:
        provider, _, model = choice.name.partition("/")
        config: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS}
        if not strict and choice.model is not None:
            config["fallback_models"] = [WITHOUT_MODEL]
        agent = self._remote.post(
            "/agents",
            {
                "name": "Demo agent",
                "system_prompt": "You are an assistant that summarises texts.",
                "config": config,
                "llm_provider": provider,
                "llm_model": model,
                "retry_policy": {"max_attempts": 1},
            },
        )
        self._remote.post(f"/agents/{agent['id']}/start", {})
        self._teller.step("agent", f"{agent['name']} with {choice.name}")
        return dict(agent)

    def _report_event(self, event: str, data: dict[str, Any]) -> None:
        if event == "task.assigned":
            self._teller.step("claim", f"a worker has leased it, attempt {data.get('attempt') or 1}")
        elif event == "task.started":
            self._teller.step("model", "the worker runs the agent, which calls the model through the gateway")
        elif event == "task.progress":
            goes_on, fresh = self._live.add(str((data.get("progress") or {}).get("message") or ""))
            if fresh:
                self._teller.print_model_text(fresh, goes_on=goes_on)
        elif event in TERMINAL:
            self._teller.step("result", event.removeprefix("task."))

    def _task_outcome(self, task_id: str, began: float) -> dict[str, Any]:
        task = self._remote.get(f"/tasks/{task_id}")
        result, cost = task["result"], task["cost"]
        calls = self._remote.get("/llm/calls", task_id=task_id)["items"]
        text = result["text"] if isinstance(result, dict) and "text" in result else json.dumps(result or task["error"])
        return {
            "status": task["status"],
            "task_id": task_id,
            "result": text,
            "model": f"{calls[0]['provider']}/{calls[0]['model']}" if calls else None,
            "first_token_ms": calls[0]["first_token_ms"] if calls else None,
            "input_tokens": cost["input_tokens"],
            "output_tokens": cost["output_tokens"],
            "cost_usd": cost["cost_usd"],
            "duration_ms": round((time.monotonic() - began) * 1000),
        }

    def _wait_for_worker(self, until: float) -> None:
        while time.monotonic() < until:
            fleet = self._remote.get("/workers/overview")
            if fleet["online"]:
                self._teller.step("worker", f"{fleet['online']} online, capacity for {fleet['capacity']} tasks")
                return
            time.sleep(0.1)
        raise DemoFailed("no worker came online")
