"""Tests of the local model behind the gateway of a real server, and of `corral demo` with the local model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from corral_llama.plugin import LlamaPlugin

from corral.testing.conformance import check_plugin
from corral.testing.server import ServerProcess


def test_the_contract_is_kept() -> None:
    report = check_plugin(LlamaPlugin)
    assert report.ok, report


class Server:
    """A server with the plugin enabled, and an HTTP client for the server."""

    def __init__(self, process: ServerProcess, client: httpx2.Client) -> None:
        self.process, self.client = process, client

    def ask(self, text: str, **fields: Any) -> httpx2.Response:
        body = {"model": "default", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
        return self.client.post("/llm/chat/completions", json={**body, **fields})

    def stream(self, text: str, **fields: Any) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield each chunk with the number of seconds since the request was sent."""
        body = {"model": "default", "messages": [{"role": "user", "content": text}], "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        began = time.monotonic()
        with self.client.stream("POST", "/llm/chat/completions", json={**body, **fields}) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield time.monotonic() - began, json.loads(line[6:])

    def child(self) -> psutil.Process:
        """The process that runs the model."""
        assert self.process.process is not None
        below = psutil.Process(self.process.process.pid).children(recursive=True)
        (found,) = [item for item in below if any("corral_llama" in word for word in item.cmdline())]
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    config = folder / "corral.toml"
    config.write_text(f'local_model = "{demo_model}"\n[plugins]\nenabled = ["llama"]\n')
    with ServerProcess(folder, environ={"CORRAL_CONFIG": str(config)}) as process, process.sign_in() as client:
        yield Server(process, client)


def content(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices") or ())


def test_llm_2_the_local_model_answers_and_costs_nothing(server: Server, demo_model: Path) -> None:
    name = f"local/{demo_model.stem}"
    answer = server.ask("Say hello.")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name  # the default model if no other is configured
    assert answer.json()["choices"][0]["message"]["content"].strip()
    assert answer.json()["usage"]["completion_tokens"] > 0
    assert float(answer.headers["Corral-Cost-Usd"]) == 0
    chunks = list(server.stream("Tell me about the sea.", max_tokens=20))
    assert next(seconds for seconds, chunk in chunks if content(chunk)) <= 2.0 + crowd()
    assert chunks[-1][1]["usage"]["completion_tokens"] == 20
    listed = {item["id"]: item for item in server.client.get("/llm/models").json()["data"]}
    facts = listed[name]["capabilities"]
    assert (facts["tools"], facts["json"], facts["embeddings"], facts["demo"]) == (False, "grammar", False, True)
    assert (listed[name]["context_window"], listed[name]["available"]) == (4096, True)
    assert listed[name]["max_output_tokens"] == 512  # the default limit: the model may repeat itself forever
    calls = server.client.get("/llm/calls", params={"provider": "local"}).json()["items"]
    assert {(call["status"], call["cost_usd"]) for call in calls} == {("completed", 0.0)}


def test_what_the_model_cannot_do_is_named(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    answer = server.ask("What time is it?", tools=[tool])
    assert answer.status_code == 200, answer.text
    assert "tools" in answer.headers["Corral-Ignored"]


def test_what_is_too_long_is_400(server: Server) -> None:
    assert server.ask("word " * 6000).status_code == 400


def crowd() -> float:
    """How many seconds more a machine may take that has other things to do."""
    return os.getloadavg()[0] / 2


class Health:
    """Requests `/health` continuously in a thread."""

    def __init__(self, server: Server) -> None:
        self._address = server.process.address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []

    def _run(self) -> None:
        with httpx2.Client(trust_env=False) as client:
            while not self._over.is_set():
                began = time.monotonic()
                assert client.get(f"{self._address}/health").status_code == 200
                self.seconds.append(time.monotonic() - began)
                time.sleep(0.02)

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def computes(process: psutil.Process) -> None:
    """Wait until a process has computed for a moment, which takes longer on a busy machine."""
    before = sum(process.cpu_times()[:2])
    while sum(process.cpu_times()[:2]) < before + 0.3:
        time.sleep(0.02)


@pytest.mark.parametrize("streaming", [True, False])
def test_llm_8_a_killed_model_fails_its_call_and_nothing_else(server: Server, streaming: bool) -> None:
    server.ask("Say hello.")
    child, killed = server.child(), 0.0

    def kill() -> None:
        nonlocal killed
        killed = time.monotonic()
        child.kill()

    with Health(server) as health:
        if streaming:
            chunks = []
            for _, chunk in server.stream("Tell a very long story.", max_tokens=3000):
                chunks.append(chunk)
                if not killed and content(chunk):
                    kill()
            problem = chunks[-1]["error"]
        else:
            threading.Thread(target=lambda: (computes(child), kill())).start()
            answer = server.ask("Tell a very long story.", max_tokens=3000)
            assert answer.status_code == 503, answer.text
            problem = answer.json()
        assert killed, "the response ended before the process was killed"
        assert time.monotonic() - killed <= 2.0 + crowd()
        assert problem["code"] == "dependency_unavailable"
        assert server.ask("Say hello.").status_code == 200
    assert sorted(health.seconds)[len(health.seconds) * 95 // 100] < 0.25 + crowd() / 4
    assert server.child().pid != child.pid


def demo(folder: Path, model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    (folder / "tmp").mkdir(exist_ok=True)
    environ |= {"CORRAL_LOCAL_MODEL": str(model), "TMPDIR": str(folder / "tmp")}
    return subprocess.run(
        [sys.executable, "-m", "corral", "demo", "--once", *arguments],
        cwd=folder,
        env=environ,
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )


def test_operations_2_the_demo_does_its_task_with_the_model(tmp_path: Path, demo_model: Path) -> None:
    done = demo(tmp_path, demo_model, "--require-model", "--json")
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert (told["status"], told["model"], told["cost_usd"]) == ("completed", f"local/{demo_model.stem}", 0)
    assert 0 < told["output_tokens"] <= 120
    assert told["input_tokens"] > 300
    assert len(told["result"]) > 100
    assert told["workflow"]["status"] == "completed"
    assert told["workflow"]["output"]["text"][:100] == told["result"][:100]
    assert list((tmp_path / "tmp").iterdir()) == []
    left = [item for item in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(item.info["cmdline"] or ())]
    assert left == []


def test_operations_2_a_signal_while_the_model_writes_leaves_nothing(tmp_path: Path, demo_model: Path) -> None:
    environ = {**os.environ, "CORRAL_LOCAL_MODEL": str(demo_model), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "corral", "demo", "--once", "--require-model"],
        cwd=tmp_path,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "calls the model through the gateway" in line:
            break
    time.sleep(1)
    tree = psutil.Process(process.pid).children(recursive=True)
    assert any("corral_llama" in word for item in tree for word in item.cmdline())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [item for item in tree if item.is_running() and item.status() != psutil.STATUS_ZOMBIE] == []
    assert list(tmp_path.iterdir()) == []


def test_operations_2_an_input_over_the_context_of_the_model(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "long.txt").write_text("A word after another. " * 800)
    done = demo(tmp_path, demo_model, "--input", "long.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "4096" in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_model_that_does_not_load(tmp_path: Path, demo_model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_model.read_bytes()[:5_000_000])  # the header is whole, the weights are not
    done = demo(tmp_path, broken, "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["model"] == "scripted/echo"
    done = demo(tmp_path, broken, "--json", "--require-model")
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "failed"
