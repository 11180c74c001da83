"""A real server with its embedded worker and a scripted model: an agent that uses every kind of tool."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx2

from corral.testing.server import ServerProcess

SCRIPT = {
    "turns": [
        {
            "tool_calls": [
                {"name": "workspace__write", "arguments": {"path": "a.txt", "content": "42"}},
                {"name": "workspace__read", "arguments": {"path": "a.txt"}},
            ]
        },
        {"tool_calls": [{"name": "human__ask", "arguments": {"prompt": "Shall I go on?"}}]},
        {"tool_calls": [{"name": "tasks__create", "arguments": {"title": "the rest", "agent_role": "nobody"}}]},
        {"text": "done"},
    ]
}


def until(client: httpx2.Client, task_id: str, status: str) -> dict[str, Any]:
    """Wait until the task has this status and return it."""
    end = time.monotonic() + 60
    while True:
        task: dict[str, Any] = client.get(f"/tasks/{task_id}").json()
        if task["status"] == status:
            return task
        assert task["status"] not in ("failed", "cancelled", "completed"), task["error"]
        assert time.monotonic() < end, task
        time.sleep(0.1)


def test_an_agent_uses_its_tools(tmp_path: Path) -> None:
    config = tmp_path / "corral.toml"
    config.write_text(
        '[plugins.workers]\nembedded_allow = ["workspace.read", "workspace.write"]\n'
        f"[plugins.llm.scripts]\nhandy = {json.dumps(str(tmp_path / 'handy.json'))}\n"
        '[settings]\n"llm.default_model" = "scripted/handy"\n'
    )
    (tmp_path / "handy.json").write_text(json.dumps(SCRIPT))
    environ = {"CORRAL_CONFIG": str(config)}
    with ServerProcess(tmp_path, arguments=(), environ=environ) as server, server.sign_in() as admin:
        body = {"name": "handy", "enabled_tools": ["workspace.*", "human.ask", "tasks.create"]}
        agent = admin.post("/agents", json=body).json()
        admin.post(f"/agents/{agent['id']}/start").raise_for_status()
        task = admin.post("/tasks", json={"title": "work", "agent_id": agent["id"]}).json()
        waiting = until(admin, task["id"], "waiting")
        assert waiting["waiting_for"]["prompt"] == "Shall I go on?"
        admin.post(f"/tasks/{task['id']}/input", json={"input": "yes"}).raise_for_status()
        done = until(admin, task["id"], "completed")
        assert (done["result"], done["attempt"], done["tainted"]) == ({"text": "done"}, 1, False)
        calls = admin.get(f"/tasks/{task['id']}/tool-calls").json()["items"]
        children = admin.get("/tasks", params={"parent_task_id": task["id"]}).json()["items"]
    told = [(call["tool"], call["status"]) for call in calls]
    assert told == [
        ("workspace.write", "succeeded"),
        ("workspace.read", "succeeded"),
        ("human.ask", "succeeded"),
        ("tasks.create", "succeeded"),
    ]
    assert "42" in json.dumps(calls[1]["result"])
    assert calls[2]["result"] == "yes"
    assert [child["title"] for child in children] == ["the rest"]
