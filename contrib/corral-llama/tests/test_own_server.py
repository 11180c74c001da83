"""Tests of llama.cpp's own server as an OpenAI-compatible provider, without this plugin.

The prompt shows the demo model how to call tools. The model itself generates the calls and their arguments.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Client

from corral.testing.server import ServerProcess

KEY = "a-key-of-the-test-only-0123456789"
TOOLS = ["workspace.write", "workspace.list"]
TURN = """Write "{text}" into {path} and show the files.<|im_end|>
<|im_start|>assistant
<tool_call>
{{"name": "workspace_write", "arguments": {{"path": "{path}", "content": "{text}"}}}}
</tool_call>
<tool_call>
{{"name": "workspace_list", "arguments": {{}}}}
</tool_call><|im_end|>
<|im_start|>user
"""
SHOWN = [("good day", "day.txt"), ("yes", "answer.txt"), ("see you", "note.txt"), ("the end", "end.txt")]


@pytest.fixture(scope="module")
def address(demo_model: Path) -> Iterator[str]:
    here = Path(__file__).parent
    command = [sys.executable, str(here / "own_server.py"), str(demo_model), str(here / "tools.jinja"), KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


@pytest.fixture(scope="module")
def client(address: str, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("server")
    config = folder / "corral.toml"
    config.write_text(
        f'[plugins.llm.providers.rack]\nkind = "openai"\nbase_url = "{address}/v1"\napi_key = "{KEY}"\n'
        f'models = [{{id = "{demo_model.stem}"}}]\n'
        f"[plugins.workers]\nembedded_allow = {TOOLS}\n"
    )
    with (
        ServerProcess(folder, arguments=(), environ={"CORRAL_CONFIG": str(config)}) as process,
        process.sign_in() as client,
    ):
        yield client


@pytest.fixture(scope="module")
def agent_id(client: Client, demo_model: Path) -> str:
    """The id of an agent that uses llama.cpp's server."""
    facts = {
        "name": "a",
        "llm_provider": "rack",
        "llm_model": demo_model.stem,
        "enabled_tools": TOOLS,
        "config": {"max_tokens": 150, "max_steps": 8, "temperature": 0},
    }
    agent: dict[str, Any] = client.post("/agents", json=facts).raise_for_status().json()
    client.post(f"/agents/{agent['id']}/start", json={}).raise_for_status()
    return str(agent["id"])


def done(client: Client, agent_id: str, **new: Any) -> dict[str, Any]:
    """Let the agent run a task, and return the completed task."""
    task: dict[str, Any] = client.post("/tasks", json={**new, "agent_id": agent_id}).raise_for_status().json()
    until = time.monotonic() + 600
    while task["status"] not in ("completed", "failed") and time.monotonic() < until:
        time.sleep(0.2)
        task = client.get(f"/tasks/{task['id']}").raise_for_status().json()
    assert task["status"] == "completed", task
    return task


def test_an_agent_on_llama_cpps_own_server_calls_two_tools(client: Client, agent_id: str) -> None:
    shown = "".join(TURN.format(text=text, path=path) for text, path in SHOWN)
    asked = 'Write "hello" into hello.txt and show the files.'
    task = done(client, agent_id, title="A file", instructions=shown + asked)
    calls = client.get(f"/tasks/{task['id']}/tool-calls").raise_for_status().json()["items"]
    calls.sort(key=lambda call: call["started_at"])
    assert [(call["tool"], call["arguments"]) for call in calls[:2]] == [
        ("workspace.write", {"path": "hello.txt", "content": "hello"}),
        ("workspace.list", {}),
    ]
    assert {call["status"] for call in calls} == {"succeeded"}
    assert [entry["name"] for entry in calls[1]["result"]["entries"]] == ["hello.txt"]
    assert task["cost"]["calls"] > 1
    assert task["result"]["text"]


def test_an_agent_on_llama_cpps_own_server_does_a_task(client: Client, agent_id: str) -> None:
    task = done(client, agent_id, title="Say hello.")
    assert task["result"]["text"]
    assert task["cost"]["input_tokens"] > 0
    assert task["cost"]["output_tokens"] > 0
