"""Server and worker are killed by SIGKILL at random while workflows run. Every run ends with the output that it has
without kills, and no step starts after it was completed.

Short form: 3 runs and 3 kills on each engine; long form (`--long`): 100 runs and 50 kills.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
from tests.plugins.workflows.conftest import step, transform
from tests.promises.test_r01_kill_the_server import read_log
from tests.promises.test_r02_kill_the_workers import WorkerProcess

from corral.testing.server import ServerProcess, free_port

FINAL = ("completed", "failed", "cancelled")
START_SECONDS = 120.0
"""The patience with a server that starts on a busy machine."""


class Service(BaseHTTPRequestHandler):
    """A service outside, which counts its requests by idempotency key."""

    seen: Counter[str]

    def do_GET(self) -> None:
        text = f"page {self.path.rpartition('=')[2]}".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen[self.headers["Idempotency-Key"]] += 1
        time.sleep(0.05)
        answer = json.dumps({"doubled": json.loads(body)["n"] * 2}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextlib.contextmanager
def serving() -> Iterator[tuple[int, Counter[str]]]:
    """Serve the service, and yield its port and its counts."""
    port, seen = free_port(), Counter[str]()
    service = ThreadingHTTPServer(("127.0.0.1", port), type("Counting", (Service,), {"seen": seen}))
    threading.Thread(target=service.serve_forever, daemon=True).start()
    try:
        yield port, seen
    finally:
        service.shutdown()
        service.server_close()


def definition(port: int, agent_id: str) -> list[dict[str, Any]]:
    """Agent steps, a tool step, a parallel branch, a loop, a condition, an approval, and an HTTP step."""
    say = step("say", "agent", {"instructions": "say {{ input.n }}"}, agent_id=agent_id)
    again = step("again", "agent", {"instructions": "again {{ input.n }}"}, agent_id=agent_id)
    double = {"method": "POST", "url": f"http://127.0.0.1:{port}/", "body": {"n": "{{ item }}"}}
    page = {"url": f"http://127.0.0.1:{port}/page?n={{{{ input.n }}}}"}
    return [
        say,
        step("fetch", "tool", {"tool": "http.fetch", "arguments": page}, agent_id=agent_id),
        step(
            "both",
            "parallel",
            {
                "branches": [
                    {"name": "work", "steps": [again]},
                    {"name": "plain", "steps": [transform("sum", "{{ input.n + 1 }}")]},
                ]
            },
        ),
        step(
            "each",
            "loop",
            {
                "items": [1, 2, 3, "{{ input.n }}"],
                "concurrency": 2,
                "body": [step("call", "http", double), transform("pick", "{{ steps.call.output.body.doubled }}")],
            },
        ),
        step("decide", "condition", {"expression": "input.n % 2 == 0", "if_true": ["even"], "if_false": ["odd"]}),
        transform("even", "even", order=6),
        transform("odd", "odd", order=6),
        step("ask", "approval", {"title": "Go on with {{ input.n }}?", "payload": {"n": "{{ input.n }}"}}, order=7),
        transform(
            "result",
            {
                "said": "{{ steps.say.output }}",
                "page": "{{ steps.fetch.output.text }}",
                "both": "{{ steps.both.output }}",
                "each": "{{ steps.each.output }}",
                "parity": "{{ steps.even.output }}{{ steps.odd.output }}",
                "answer": "{{ steps.ask.output.decision }}",
            },
            order=8,
        ),
    ]


class Site:
    """A server, a worker, a workflow, and a person who approves everything."""

    def __init__(self, folder: Path, database_url: str, port: int) -> None:
        environ = {"CORRAL_TASK_LEASE_SECONDS": "10", "CORRAL_ACCESS_TTL": "3600", "CORRAL_EGRESS_ALLOW": "127.0.0.1"}
        self.server = ServerProcess(folder, database_url=database_url, environ=environ)
        self.server.start(seconds=START_SECONDS)
        admin = self.server.sign_in()
        key = admin.post("/security/api-keys", json={"name": "test", "scopes": ["*"]}).raise_for_status().json()
        self.client, self.person = self.server.client(key["key"]), admin  # a key may not decide
        fleet = {"name": "fleet", "auto_approve": True}
        registration = self.client.post("/admin/registration-keys", json=fleet).raise_for_status().json()
        self.worker = WorkerProcess(self.server, folder, "worker", registration["key"])
        self.worker.start()
        fields = {"name": "agent", "max_concurrent_tasks": 10, "enabled_tools": ["http.fetch"]}
        agent_id = self.client.post("/agents", json=fields).raise_for_status().json()["id"]
        self.client.post(f"/agents/{agent_id}/start").raise_for_status()
        body = {"name": "killed", "steps": definition(port, agent_id)}
        made = self.client.post("/workflows", json=body)
        assert made.status_code == 201, made.text
        self.workflow_id = made.json()["id"]

    def start(self, n: int) -> str:
        """Start a run. The key lets the request be repeated after a kill."""
        answer = self.client.post(
            f"/workflows/{self.workflow_id}/run", json={"input": {"n": n}}, headers={"Idempotency-Key": f"run {n}"}
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait(self, ids: list[str], seconds: float) -> dict[str, Any]:
        """Approve until all runs have ended, and return them."""
        until = time.monotonic() + seconds
        ended: dict[str, Any] = {}
        while len(ended) < len(ids) and time.monotonic() < until:
            self.look(ids, ended)
            time.sleep(0.2)
        return ended

    def look(self, ids: list[str], ended: dict[str, Any]) -> None:
        """Read the runs that have not ended, and approve what they ask for."""
        for run_id in ids:
            if run_id in ended:
                continue
            with contextlib.suppress(httpx2.HTTPError):
                run = self.client.get(f"/workflow-runs/{run_id}").raise_for_status().json()
                if run["status"] in FINAL:
                    ended[run_id] = run
                elif "ask" in run["current_steps"]:
                    self.approve(run_id)

    def approve(self, run_id: str) -> None:
        """Approve what the run asks for. Between a decision and the next advance, nothing is left to decide."""
        asked = self.client.get(f"/approvals?run_id={run_id}&status=pending").raise_for_status().json()["items"]
        for approval in asked:
            self.person.post(f"/approvals/{approval['id']}/approve", json={})

    def kill(self) -> None:
        """Kill the server or the worker, and start it again."""
        if random.random() < 0.7:
            self.server.kill()
            self.server.start(seconds=START_SECONDS)
        else:
            self.worker.kill()
            self.worker.start()

    def stop(self) -> None:
        """End both processes."""
        self.worker.kill()
        self.server.kill()


def judge(events: list[dict[str, Any]]) -> int:
    """Check that no step started after it was completed, and return the number of completed steps."""
    completed: set[tuple[str, str, str]] = set()
    for event in events:
        if event["event"] not in ("step.started", "step.completed"):
            continue
        data = event["data"]
        at = (data["run_id"], data["step"], str(data["iteration"]))
        assert at not in completed, f"{event['event']} of {at} after the step was completed"
        if event["event"] == "step.completed":
            completed.add(at)
    return len(completed)


def test_workflows_2_runs_end_as_if_nothing_had_been_killed(database_url: str, tmp_path: Path, long_form: bool) -> None:
    random.seed(11)
    runs, kills = (100, 50) if long_form else (3, 3)
    with serving() as (port, seen):
        site = Site(tmp_path, database_url, port)
        try:
            first = site.wait([site.start(1000)], 60)
            (undisturbed,) = first.values()
            assert undisturbed["status"] == "completed", undisturbed["error"]
            assert undisturbed["output"]["result"]["page"] == "page 1000"
            ids = [site.start(n) for n in range(runs)]
            ended: dict[str, Any] = {}
            for _ in range(kills):
                until = time.monotonic() + random.uniform(0.3, 2.0)
                while time.monotonic() < until:
                    site.look(ids, ended)
                    time.sleep(0.1)
                site.kill()
            ended |= site.wait([each for each in ids if each not in ended], 1800 if long_form else 150)
            assert len(ended) == runs, site.server.log[-3000:]
            for n, run_id in enumerate(ids):
                assert ended[run_id]["status"] == "completed", ended[run_id]["error"]
                assert ended[run_id]["output"] == expected(undisturbed["output"], n)
            steps = judge(read_log(site.client))
        finally:
            site.stop()
    all_steps = [each for run in (undisturbed, *ended.values()) for each in run["steps"]]
    assert steps == sum(each["status"] == "completed" for each in all_steps)
    assert len(seen) == 4 * (runs + 1)  # each call has one key, however often it was made


def expected(output: dict[str, Any], n: int) -> dict[str, Any]:
    """The output of the undisturbed run, for another input."""
    text = json.dumps(output).replace("1000", str(n)).replace("1001", str(n + 1))
    found: dict[str, Any] = json.loads(text)
    result = found["result"]
    result["both"]["plain"] = n + 1
    result["each"]["results"][3] = n * 2
    result["parity"] = "odd" if n % 2 else "even"
    return found
