"""An agent on an OpenAI-compatible and on an Anthropic-shaped server does a task with two tools.

The models' servers are recordings behind a real socket: they stream what such servers stream.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from corral.testing.server import ServerProcess

TOOLS = ("workspace.write", "workspace.read")
CALLS = (
    ("workspace__write", {"path": "sum.txt", "content": "6 * 7 = 42"}),
    ("workspace__read", {"path": "sum.txt"}),
)
USAGE = (30, 5)  # input and output tokens of every step


def openai_events(step: int, asked: dict[str, Any]) -> Iterator[str]:
    """The stream of one step as OpenAI's API sends it."""
    base = {"id": f"chatcmpl-{step}", "object": "chat.completion.chunk", "created": 1, "model": asked["model"]}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        return json.dumps({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield chunk({"role": "assistant", "content": ""})
    if step < len(CALLS):
        name, arguments = CALLS[step]
        text = json.dumps(arguments)
        function = {"name": name, "arguments": ""}
        yield chunk({"tool_calls": [{"index": 0, "id": f"call_{step}", "type": "function", "function": function}]})
        for part in (text[:9], text[9:]):
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        yield chunk({}, "tool_calls")
    else:
        yield chunk({"content": "The file says: "})
        yield chunk({"content": asked["messages"][-1]["content"]})
        yield chunk({}, "stop")
    usage = {"prompt_tokens": USAGE[0], "completion_tokens": USAGE[1], "total_tokens": sum(USAGE)}
    yield json.dumps({**base, "choices": [], "usage": usage})
    yield "[DONE]"


def anthropic_events(step: int, asked: dict[str, Any]) -> Iterator[str]:
    """The stream of one step as Anthropic's API sends it."""
    message = {"id": f"msg_{step}", "type": "message", "role": "assistant", "model": asked["model"], "content": []}
    yield json.dumps(
        {"type": "message_start", "message": {**message, "usage": {"input_tokens": USAGE[0], "output_tokens": 1}}}
    )
    if step < len(CALLS):
        name, arguments = CALLS[step]
        text = json.dumps(arguments)
        block = {"type": "tool_use", "id": f"toolu_{step}", "name": name, "input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": part} for part in (text[:9], text[9:])]
    else:
        block = {"type": "text", "text": ""}
        found = asked["messages"][-1]["content"][0]["content"]
        deltas = [{"type": "text_delta", "text": part} for part in ("The file says: ", str(found))]
    yield json.dumps({"type": "content_block_start", "index": 0, "content_block": block})
    for delta in deltas:
        yield json.dumps({"type": "content_block_delta", "index": 0, "delta": delta})
    yield json.dumps({"type": "content_block_stop", "index": 0})
    reason = "tool_use" if step < len(CALLS) else "end_turn"
    yield json.dumps({"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": USAGE[1]}})
    yield json.dumps({"type": "message_stop"})


class Recording(ThreadingHTTPServer):
    """A model's server that says its part, one step a request; `asked` are the requests."""

    daemon_threads = True

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind = kind
        self.asked: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}{'/v1' if kind == 'openai' else ''}"


class Handler(BaseHTTPRequestHandler):
    """Of `Recording`."""

    server: Recording

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        step = len(self.server.asked)
        self.server.asked.append(asked)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        events = openai_events if self.server.kind == "openai" else anthropic_events
        for data in events(step, asked):
            name = "" if self.server.kind == "openai" else f"event: {json.loads(data)['type']}\n"
            self.wfile.write(f"{name}data: {data}\n\n".encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture(params=["openai", "anthropic"])
def model(request: pytest.FixtureRequest) -> Iterator[Recording]:
    server = Recording(request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_task_with_two_tools_is_done_and_paid_once(model: Recording, tmp_path: Path) -> None:
    config = tmp_path / "corral.toml"
    config.write_text(
        f'[plugins.llm.providers.recorded]\nkind = "{model.kind}"\nbase_url = "{model.url}"\napi_key = "sk-123456789"\n'
        'models = [{id = "m-1"}]\n'
        f"[plugins.workers]\nembedded_allow = {json.dumps(TOOLS)}\n"
    )
    environ = {"CORRAL_CONFIG": str(config)}
    with ServerProcess(tmp_path, arguments=(), environ=environ) as process, process.sign_in() as client:

        def call(method: str, path: str, body: Any = None) -> Any:
            answer = client.request(method, path, json=body)
            assert answer.is_success, answer.text
            return answer.json()

        facts = {
            "name": "a",
            "llm_provider": "recorded",
            "llm_model": "m-1",
            "enabled_tools": TOOLS,
            "tool_policy": dict.fromkeys(TOOLS, "allow"),
        }
        agent = call("POST", "/agents", facts)
        call("POST", f"/agents/{agent['id']}/start", {})
        task = call("POST", "/tasks", {"title": "What is six times seven?", "agent_id": agent["id"]})
        until = time.monotonic() + 60
        while task["status"] not in ("completed", "failed") and time.monotonic() < until:
            time.sleep(0.1)
            task = call("GET", f"/tasks/{task['id']}")
        assert task["status"] == "completed", (task, process.log[-3000:])
        assert "6 * 7 = 42" in task["result"]["text"]
        calls = call("GET", f"/tasks/{task['id']}/tool-calls")["items"]
        assert [(each["tool"], each["status"]) for each in calls] == [(name, "succeeded") for name in TOOLS]
        steps = len(CALLS) + 1
        assert len(model.asked) == steps
        paid = {name: task["cost"][name] for name in ("calls", "input_tokens", "output_tokens")}
        assert paid == {"calls": steps, "input_tokens": steps * USAGE[0], "output_tokens": steps * USAGE[1]}
