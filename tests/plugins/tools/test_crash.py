"""The server is killed while tools run: each tool ran exactly once, or its outcome is reported as unknown.

This is the part of promise 6 that needs no approvals.
"""

from __future__ import annotations

import contextlib
import http.server
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from corral import clock
from corral.testing.server import ServerProcess
from corral_plugins.tools.service.call_store import ALIVE_SECONDS

CALLS = 30


class Slow(http.server.BaseHTTPRequestHandler):
    """Responds when the test allows it, and counts the requests."""

    seen: list[str]
    gate: threading.Event

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.seen.append(self.command)
        self.gate.wait(60)
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing."""


@pytest.fixture
def slow() -> Iterator[http.server.ThreadingHTTPServer]:
    """A receiver that delays its responses."""
    Slow.seen, Slow.gate = [], threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    Slow.gate.set()
    server.shutdown()


class Attempt:
    """A started run, which calls tools with its attempt token."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        with server.sign_in() as admin:
            agent = admin.post(
                "/agents",
                json={"name": "a", "enabled_tools": ["http.*", "tasks.*"], "tool_policy": {"http.request": "allow"}},
            ).json()
            admin.post(f"/agents/{agent['id']}/start")
            task = admin.post("/tasks", json={"title": "t", "agent_id": agent["id"]}).json()
            worker = admin.post("/workers/register", json={"name": "w"}).json()
            admin.patch(f"/admin/workers/{worker['id']}/approve", json={"is_approved": True})
        with server.client(worker["token"]) as machine:
            (claim,) = machine.post(f"/workers/{worker['id']}/claim", json={"wait_seconds": 0}).json()["tasks"]
            machine.post(f"/tasks/{task['id']}/start", json={"lease_id": claim["lease_id"]}).raise_for_status()
        self.task_id, self.token = task["id"], claim["agent_token"]

    def call(self, tool: str, call_id: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Make one call. None: the server could not be reached."""
        try:
            with self.server.client(self.token) as client:
                answer = client.post(
                    f"/tasks/{self.task_id}/tools/{tool}", json={"call_id": call_id, "arguments": arguments}, timeout=60
                )
        except httpx2.HTTPError:
            return None
        if answer.status_code in (500, 502, 503):
            return None
        assert answer.status_code == 200, answer.text
        call: dict[str, Any] = answer.json()
        return call

    def insist(self, tool: str, call_id: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Repeat the call until the server responds."""
        while (found := self.call(tool, call_id, arguments)) is None:
            time.sleep(0.05)
        return found


def test_tools_6_a_killed_server_runs_nothing_twice(
    tmp_path: Path, database_url: str, slow: http.server.ThreadingHTTPServer
) -> None:
    url = f"http://127.0.0.1:{slow.server_port}/"
    environ = {"CORRAL_EGRESS_ALLOW": f"127.0.0.1:{slow.server_port}"}
    environ["CORRAL_TASK_LEASE_SECONDS"] = "3600"  # nobody renews the lease while the server starts again
    with ServerProcess(tmp_path, database_url=database_url, environ=environ) as server, ThreadPoolExecutor(8) as pool:
        attempt = Attempt(server)
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "get": ("http.fetch", {"url": url}),
            "post": ("http.request", {"url": url, "method": "POST", "body": "x"}),
        }
        killed = threading.Event()

        def begin(tool: str, call_id: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
            """Make one call, and repeat it while a busy server refuses it."""
            while (found := attempt.call(tool, call_id, arguments)) is None and not killed.is_set():
                time.sleep(0.05)
            return found

        began = [pool.submit(begin, tool, call_id, arguments) for call_id, (tool, arguments) in calls.items()]
        _until(lambda: sorted(Slow.seen) == ["GET", "POST"])
        makes = [
            pool.submit(attempt.insist, "tasks.create", f"make-{n}", {"title": f"child {n}"}) for n in range(CALLS)
        ]
        _until(lambda: sum(make.done() for make in makes) >= 5)
        killed.set()
        server.kill()
        assert _let_time_pass(database_url) >= 2
        server.start()
        assert [each.result() for each in began] == [None, None]
        made = [make.result()["result"]["task_id"] for make in makes]
        Slow.gate.set()
        ended = {call_id: attempt.insist(*_call(calls, call_id)) for call_id in calls}
        assert ended["get"]["status"] == "succeeded"
        assert (ended["post"]["status"], ended["post"]["error"]["type"]) == ("failed", "outcome_unknown")
        assert Slow.seen.count("POST") == 1
        with server.sign_in() as admin:
            page = admin.get("/tasks", params={"parent_task_id": attempt.task_id, "limit": 200}).json()
        assert sorted(task["id"] for task in page["items"]) == sorted(set(made))
        assert len(made) == CALLS


def _let_time_pass(url: str) -> int:
    """Let the calls of the dead process count as interrupted at once, not after 15 s, and return their number."""
    sqlite = url.startswith("sqlite")
    engine: Any = sqlite3.connect(url.removeprefix("sqlite:///")) if sqlite else psycopg.connect(url)
    with contextlib.closing(engine), engine:
        running = "tools_calls WHERE status = 'running' AND alive_until IS NOT NULL"
        times = [row[0] for row in engine.execute(f"SELECT alive_until FROM {running}").fetchall()]
        assert max(times) <= clock.now(ALIVE_SECONDS), times
        engine.execute(f"UPDATE tools_calls SET alive_until = '{clock.now(-1)}' {running.removeprefix('tools_calls ')}")
    return len(times)


def _call(calls: dict[str, tuple[str, dict[str, Any]]], call_id: str) -> tuple[str, str, dict[str, Any]]:
    tool, arguments = calls[call_id]
    return tool, call_id, arguments


def _until(is_so: Any) -> None:
    end = time.monotonic() + 180
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)
