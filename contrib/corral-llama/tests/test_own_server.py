"""llama.cpp's own server as any other OpenAI-compatible one: by its address and key, without this plugin.

The demo model is too small to call tools; that they are offered, and that the task is done and counted, is what shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import corral_llama
import pytest

from corral.testing.server import ServerProcess

KEY = "a-key-of-the-test-only-0123456789"


@pytest.fixture(scope="module")
def address(demo_model: Path) -> Iterator[str]:
    program = Path(corral_llama.__file__).with_name("child.py")
    given = {"import_path": sys.path, "model": str(demo_model), "context_tokens": 4096, "threads": 2, "api_key": KEY}
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(given) + "\n")
        child.stdin.flush()
        yield json.loads(child.stdout.readline())["address"]
        child.kill()


def test_an_agent_on_llama_cpps_own_server_does_a_task(address: str, demo_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "corral.toml"
    config.write_text(
        f'[plugins.llm.providers.rack]\nkind = "openai"\nbase_url = "{address}/v1"\napi_key = "{KEY}"\n'
        f'models = [{{id = "{demo_model.stem}"}}]\n'
        '[plugins.workers]\nembedded_allow = ["workspace.write", "workspace.list"]\n'
    )
    with (
        ServerProcess(tmp_path, arguments=(), environ={"CORRAL_CONFIG": str(config)}) as process,
        process.sign_in() as client,
    ):
        facts = {"name": "a", "llm_provider": "rack", "llm_model": demo_model.stem, "config": {"max_tokens": 40},
                 "enabled_tools": ["workspace.write", "workspace.list"]}  # fmt: skip
        agent = client.post("/agents", json=facts).raise_for_status().json()
        client.post(f"/agents/{agent['id']}/start", json={}).raise_for_status()
        task = {"title": "Say hello.", "agent_id": agent["id"]}
        task = client.post("/tasks", json=task).raise_for_status().json()
        until = time.monotonic() + 120
        while task["status"] not in ("completed", "failed") and time.monotonic() < until:
            time.sleep(0.2)
            task = client.get(f"/tasks/{task['id']}").raise_for_status().json()
        assert task["status"] == "completed", (task, process.log[-3000:])
        assert task["result"]["text"]
        assert task["cost"]["input_tokens"] > 0
        assert task["cost"]["output_tokens"] > 0
