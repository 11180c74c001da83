"""What the demo asks of its server, over the public API and nothing else."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

TERMINAL = ("task.completed", "task.failed", "task.cancelled")


class Failed(Exception):
    """The demo cannot go on; the message says why."""


class DemoClient:
    """A small client of `http://127.0.0.1:port`."""

    def __init__(self, address: str) -> None:
        import httpx2

        self._http = httpx2.Client(base_url=f"{address}/api/v1", timeout=30, trust_env=False)
        self._errors = httpx2.HTTPError

    def wait_until_ready(self, server: subprocess.Popen[bytes], seconds: float) -> None:
        """Return when the server answers; `Failed` when it ended or is too slow."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if server.poll() is not None:
                raise Failed(f"the server ended with status {server.returncode}")
            try:
                if self._http.get("/health/ready").status_code == 200:
                    return
            except self._errors:
                pass
            time.sleep(0.05)
        raise Failed(f"the server was not ready within {seconds:g} s")

    def sign_in(self, email: str, password: str) -> None:
        """Log in; later calls carry the token."""
        tokens = self._post("/auth/login", {"email": email, "password": password})
        self._http.headers["Authorization"] = f"Bearer {tokens['access_token']}"

    def run_task(self, text: str, step: Callable[[str, str], None], seconds: float) -> dict[str, Any]:
        """Create an agent and a task for it, tell each step, return how it ended."""
        began = time.monotonic()
        self._wait_for_worker(step, seconds)
        agent = self._post(
            "/agents",
            {
                "name": "Demo agent",
                "system_prompt": "Summarise what you are given.",
                "config": {"temperature": 0, "max_tokens": 120},
            },
        )
        self._post(f"/agents/{agent['id']}/start", {})
        model = self._model()
        step("agent", f"{agent['name']} with {model}")
        task = self._post(
            "/tasks",
            {
                "title": "Summarise the notes",
                "instructions": f"Summarise these notes in three sentences.\n\n{text}",
                "agent_id": agent["id"],
            },
        )
        step("task", f"{task['title']}  {task['id']}")
        created = time.monotonic()
        for event, data in self._events(task["id"], began + seconds):
            if event == "task.assigned":
                step("claim", f"a worker has leased it, attempt {data.get('attempt') or 1}")
            elif event == "task.started":
                step("model", "the worker runs the agent; the model is called through the gateway")
            elif event in TERMINAL:
                step("result", event.removeprefix("task."))
        return {**self._outcome(task["id"], created), "model": model}

    def _outcome(self, task_id: str, began: float) -> dict[str, Any]:
        task = self._get(f"/tasks/{task_id}")
        result = task["result"]
        text = (
            result.get("text") if isinstance(result, dict) and "text" in result else json.dumps(result or task["error"])
        )
        cost = task["cost"] or {}
        return {
            "status": task["status"],
            "task_id": task_id,
            "result": text,
            "input_tokens": cost.get("input_tokens", 0),
            "output_tokens": cost.get("output_tokens", 0),
            "cost_usd": cost.get("cost_usd", 0),
            "duration_ms": round((time.monotonic() - began) * 1000),
        }

    def _wait_for_worker(self, step: Callable[[str, str], None], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            fleet = self._get("/workers/overview")
            if fleet["online"]:
                step("worker", f"{fleet['online']} online, room for {fleet['capacity']} tasks")
                return
            time.sleep(0.1)
        raise Failed("no worker came online")

    def _model(self) -> str:
        models = self._get("/llm/models")["data"]
        return next(
            (model["id"] for model in models if model.get("default")), models[0]["id"] if models else "no model"
        )

    def _events(self, task_id: str, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events of the task, in order, until it has ended."""
        after = "0"
        while time.monotonic() < until:
            page = self._get(f"/events?object_type=task&object_id={task_id}&after={after}&wait=5")
            for item in page["items"]:
                yield item["event"], item["data"]
                if item["event"] in TERMINAL:
                    return
            after = page["next"]
        raise Failed(f"the task had not ended after {TASK_LIMIT_TEXT}")

    def _get(self, path: str) -> Any:
        return self._answer(self._http.get(path))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._answer(self._http.post(path, json=body))

    @staticmethod
    def _answer(answer: Any) -> Any:
        if answer.status_code >= 400:
            raise Failed(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:500]}")
        return answer.json()


TASK_LIMIT_TEXT = "two minutes"
