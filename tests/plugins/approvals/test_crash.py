"""The server is killed between an approval and the execution: the tool runs exactly once, or the outcome is unknown."""

from __future__ import annotations

import http.server
import time
from pathlib import Path
from typing import Any

import httpx2
from tests.plugins.tools.test_crash import Slow, _let_time_pass, _until, slow

from corral.testing.server import ServerProcess

__all__ = ["slow"]


class Held:
    """A run that waits for the approval of one tool call."""

    def __init__(self, server: ServerProcess, admin: httpx2.Client, tool: str, arguments: dict[str, Any]) -> None:
        policy = {"enabled_tools": [tool], "tool_policy": {tool: "ask"}}
        agent = admin.post("/agents", json={"name": tool, **policy}).json()
        admin.post(f"/agents/{agent['id']}/start")
        task = admin.post("/tasks", json={"title": "t", "agent_id": agent["id"]}).json()
        worker = admin.post("/workers/register", json={"name": f"of {tool}"}).json()
        admin.patch(f"/admin/workers/{worker['id']}/approve", json={"is_approved": True})
        with server.client(worker["token"]) as machine:
            (claim,) = machine.post(f"/workers/{worker['id']}/claim", json={"agent_ids": [agent["id"]]}).json()["tasks"]
            machine.post(f"/tasks/{task['id']}/start", json={"lease_id": claim["lease_id"]}).raise_for_status()
        self.task_id: str = task["id"]
        with server.client(claim["agent_token"]) as attempt:
            asked = attempt.post(f"/tasks/{self.task_id}/tools/{tool}", json={"call_id": "c", "arguments": arguments})
            assert asked.status_code == 202, asked.text
            self.approval_id: str = asked.json()["approval_id"]
            waits = attempt.post(f"/tasks/{self.task_id}/wait", json={"approval_id": self.approval_id})
            assert waits.json()["status"] == "waiting", waits.text

    def approve(self, admin: httpx2.Client) -> None:
        answer = admin.post(f"/approvals/{self.approval_id}/approve", json={"note": "go"})
        assert answer.json()["status"] == "approved", answer.text

    def ended(self, admin: httpx2.Client) -> Any:
        """The call once its task goes on."""
        end = time.monotonic() + 90
        while admin.get(f"/tasks/{self.task_id}").json()["status"] != "pending":
            assert time.monotonic() < end, admin.get(f"/tasks/{self.task_id}/tool-calls").text
            time.sleep(0.1)
        (call,) = admin.get(f"/tasks/{self.task_id}/tool-calls").json()["items"]
        return call


def test_tools_6_a_kill_between_approval_and_execution_runs_nothing_twice(
    tmp_path: Path, database_url: str, slow: http.server.ThreadingHTTPServer
) -> None:
    url = f"http://127.0.0.1:{slow.server_port}/"
    environ = {"CORRAL_EGRESS_ALLOW": f"127.0.0.1:{slow.server_port}"}
    with ServerProcess(tmp_path, database_url=database_url, environ=environ) as server:
        with server.sign_in() as admin:
            sent = Held(server, admin, "http.request", {"url": url, "method": "POST", "body": "x"})
            made = Held(server, admin, "tasks.create", {"title": "child", "agent_role": "nobody"})
            rejected = Held(server, admin, "http.fetch", {"url": url})
            sent.approve(admin)
            _until(lambda: Slow.seen == ["POST"])  # it has begun, and its outcome will never be known
            made.approve(admin)
            server.kill()
        _let_time_pass(database_url)
        server.start()
        with server.sign_in() as admin:
            call = sent.ended(admin)
            assert (call["status"], call["error"]["type"]) == ("failed", "outcome_unknown")
            assert made.ended(admin)["status"] == "succeeded"
            children = admin.get("/tasks", params={"parent_task_id": made.task_id}).json()
            assert children["total"] == 1
            # Approvals survive the restart, and so does whoever waits for them.
            refused = admin.post(f"/approvals/{rejected.approval_id}/reject", json={"note": "no"})
            assert refused.status_code == 200, refused.text
            assert rejected.ended(admin)["error"]["message"].endswith("They wrote: no")
        Slow.gate.set()
        assert Slow.seen == ["POST"]
