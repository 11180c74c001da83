"""The worker against a server with rare behaviour: it falls silent, forgets workers, and takes leases away."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.plugins.workers.node.conftest import Process

TASK: dict[str, Any] = {"id": "task-1", "title": "t", "instructions": "hi", "input": {}, "output_schema": None}
LEASE_SECONDS = 3
SAID = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)


class FakeServer:
    """Offers one task to the first claim. `silent`: sends no responses. `state`: that of the lease, in heartbeats.

    `stranger`: the status and body of a response that another program sends in its place.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.silent = threading.Event()
        self.refuses_token = False
        self.state, self.chat_seconds, self.claims = "ok", 60.0, 0
        self.next_heartbeat = 1
        self.registered = 0
        self.complete_seconds = 0.0
        self.stranger: tuple[int, bytes] | None = None
        self.status, self.commands = "online", list[str]()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                self.reply(self.path.removeprefix("/api/v1"), body)

            def do_GET(self) -> None:
                self.reply(self.path.removeprefix("/api/v1"), None)

            def reply(self, path: str, body: Any) -> None:
                if fake.silent.is_set():
                    self.close_connection = True
                    return
                status, answer = fake.answer(path, body, self.headers.get("authorization", ""))
                kind = "text/event-stream" if isinstance(answer, bytes) else "application/json"
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-type", kind)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()

    def of(self, name: str) -> list[Any]:
        return [body for path, body in list(self.calls) if path == name]

    def answer(self, path: str, body: Any, token: str) -> tuple[int, Any]:
        name = path.partition("?")[0].rsplit("/", 1)[-1]
        self.calls.append((name, body))
        if self.stranger is not None:
            return self.stranger
        if name == "register":
            self.registered += 1
            self.refuses_token = False
            known = {"id": "w-1", "token": f"crw_{self.registered}", "heartbeat_seconds": 1}
            return 201, {**known, "lease_seconds": LEASE_SECONDS}
        if self.refuses_token and token.startswith("Bearer crw_"):
            return 401, {"code": "unauthenticated"}
        if name == "claim":
            self.claims += 1
            if self.claims > 1:
                time.sleep(0.5)
                return 200, {"tasks": [], "reason": "none"}
            claim = {
                "task": TASK,
                "agent": {"id": "a", "config": {}, "tools": []},
                "lease_id": "lease-1",
                "fence": 1,
                "attempt": 1,
                "agent_token": "cra_a1",
                "resume": None,
                "context": {},
            }
            return 200, {"tasks": [claim], "reason": "ok"}
        if name == "heartbeat":
            ended = {"state": "lost", "reason": "complete"} if self.of("complete") else {"state": self.state}
            told = [{**lease, **ended} for lease in body["leases"]]
            more = {"status": self.status, "commands": self.commands, "next_heartbeat_seconds": self.next_heartbeat}
            return 200, {"leases": told, **more}
        if name == "signals":
            time.sleep(0.5)
            return 200, {"signals": [], "commands": []}
        if name == "completions":
            time.sleep(self.chat_seconds)
            return 200, SAID
        if name == "complete":
            time.sleep(self.complete_seconds)
        return 200, {"state": "ok", "status": "running"}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def start(fake: FakeServer, tmp_path: Path, run_corral: Callable[..., Any]) -> Callable[..., Any]:
    """Start a worker for the fake server."""

    def begin(*options: str) -> Any:
        arguments = ("worker", "--url", fake.url, "--name", "w", "--dir", str(tmp_path / "identity"), *options)
        return run_corral(*arguments, CORRAL_WORKER_TOKEN="crg_key")

    return begin


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    stop = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < stop
        time.sleep(0.02)
    return found


def task_process(worker: Process) -> psutil.Process:
    """The process of the task, which leads a group of its own."""

    def find() -> psutil.Process | None:
        for process in worker.tree():
            try:
                if os.getpgid(process.pid) == process.pid:
                    return process
            except ProcessLookupError:
                continue
        return None

    found: psutil.Process = until(find)
    return found


def test_a_whole_attempt(fake: FakeServer, start: Callable[..., Any]) -> None:
    fake.chat_seconds = 0
    worker = start()
    assert until(lambda: fake.of("complete")) == [{"result": {"text": "hello"}}]
    names = [name for name, _ in fake.calls if name not in ("heartbeat", "signals", "claim")]
    assert names == ["register", "start", "completions", "checkpoint", "logs", "progress", "complete"]
    assert worker.stop() == 0


def test_a_silent_server_ends_the_work_when_the_lease_does(
    fake: FakeServer, start: Callable[..., Any], gone: Callable[..., bool]
) -> None:
    worker = start()
    until(lambda: fake.of("completions"))
    child = task_process(worker)
    time.sleep(LEASE_SECONDS + 1)
    assert child.is_running()  # heartbeats renew it
    fake.silent.set()
    time.sleep(LEASE_SECONDS / 2)
    assert child.is_running()  # a failed call changes nothing
    assert gone([child], LEASE_SECONDS + 1)
    fake.silent.clear()
    count = len(fake.of("heartbeat"))
    until(lambda: len(fake.of("heartbeat")) > count)
    assert fake.of("fail") == fake.of("cancelled") == fake.of("release") == []


def test_leases_that_are_shorter_than_heartbeats_are_kept(fake: FakeServer, start: Callable[..., Any]) -> None:
    fake.next_heartbeat = 60
    worker = start()
    until(lambda: fake.of("completions"))
    child = task_process(worker)
    time.sleep(LEASE_SECONDS + 1)
    assert child.is_running()


STRANGERS = [(200, b"<html>"), (401, b"<html>"), (404, b"no such host"), (502, b"[1]")]


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_a_proxy_says_while_the_server_is_away_ends_nothing(
    fake: FakeServer, start: Callable[..., Any], stranger: tuple[int, bytes]
) -> None:
    fake.chat_seconds = 0.5
    worker = start()
    until(lambda: fake.of("completions"))
    fake.stranger = stranger
    until(lambda: fake.of("checkpoint"))
    count = len(fake.calls)
    time.sleep(1)
    assert len(fake.calls) - count < 20  # with pauses
    fake.stranger = None
    assert until(lambda: fake.of("complete")) == [{"result": {"text": "hello"}}]
    assert worker.popen.poll() is None
    assert fake.registered == 1
    assert fake.of("fail") == []


@pytest.mark.parametrize("stranger", [(200, b"[]"), (200, b"{}"), (302, b"")])
def test_a_wrong_address_is_told(fake: FakeServer, start: Callable[..., Any], stranger: tuple[int, bytes]) -> None:
    fake.stranger = stranger
    worker = start()
    assert worker.popen.wait(90) == 1
    assert "check the URL" in worker.output
    assert "Traceback" not in worker.output


def test_a_folder_that_was_removed_ends_no_work(fake: FakeServer, start: Callable[..., Any], tmp_path: Path) -> None:
    fake.chat_seconds = 3
    worker = start()
    until(lambda: fake.of("completions"))
    shutil.rmtree(tmp_path / "identity")
    assert until(lambda: fake.of("complete")) == [{"result": {"text": "hello"}}]
    assert worker.popen.poll() is None


def test_a_worker_that_can_start_no_process_gives_the_task_back_and_ends(
    fake: FakeServer, start: Callable[..., Any]
) -> None:
    with tempfile.TemporaryDirectory(prefix="w-", dir="/tmp") as short:  # sockets need a short path
        fake.claims = 1  # so the next brings nothing
        worker = start("--dir", short)
        until(lambda: fake.of("claim"), 30)
        (socket,) = Path(short).glob("pymp-*/*")
        socket.unlink()
        fake.claims = 0
        assert worker.popen.wait(90) == 1
        assert len(fake.of("release")) == 1
        assert fake.of("fail") == []
        assert "could not start a process" in worker.output
        assert "Traceback" not in worker.output


def test_lost_means_stop_at_once(fake: FakeServer, start: Callable[..., Any], gone: Callable[..., bool]) -> None:
    worker = start()
    until(lambda: fake.of("completions"))
    child = task_process(worker)
    fake.state = "lost"
    assert gone([child])
    time.sleep(0.5)
    assert fake.of("fail") == fake.of("cancelled") == fake.of("release") == []


def test_a_lease_that_its_own_report_ended_is_not_lost(fake: FakeServer, start: Callable[..., Any]) -> None:
    fake.chat_seconds, fake.complete_seconds = 0, 1.5  # heartbeats hear of the end before the process does
    worker = start()
    until(lambda: fake.of("complete"))
    beats = len(fake.of("heartbeat"))
    until(lambda: "completed after" in worker.output)
    assert len(fake.of("heartbeat")) > beats
    assert "lost" not in worker.output
    assert len(fake.of("complete")) == 1


def test_a_cancel_is_acknowledged(fake: FakeServer, start: Callable[..., Any], gone: Callable[..., bool]) -> None:
    worker = start()
    until(lambda: fake.of("completions"))
    child = task_process(worker)
    fake.state = "cancel_requested"
    until(lambda: fake.of("cancelled"))
    assert gone([child])
    assert fake.of("fail") == []


def test_a_crash_is_reported(fake: FakeServer, start: Callable[..., Any]) -> None:
    worker = start()
    until(lambda: fake.of("completions"))
    task_process(worker).kill()
    (failure,) = until(lambda: fake.of("fail"))
    assert failure["error"]["type"] == "worker_crash"
    assert failure["retryable"] is True
    assert "SIGKILL" in failure["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_draining_waits_for_the_model_call_and_no_longer(
    fake: FakeServer, start: Callable[..., Any], number: signal.Signals
) -> None:
    worker = start("--drain-seconds", "1")
    until(lambda: fake.of("completions"))
    began = time.monotonic()
    worker.signal(number)
    assert worker.popen.wait(60) == 0
    assert time.monotonic() - began < 50  # the answer of the model takes a minute
    assert len(fake.of("release")) == 1


def test_a_worker_that_missed_the_resume_goes_on_by_its_state(fake: FakeServer, start: Callable[..., Any]) -> None:
    fake.chat_seconds = 0
    start()
    until(lambda: fake.of("complete"))
    fake.status, fake.commands = "draining", ["drain"]
    beats = len(fake.of("heartbeat"))
    until(lambda: len(fake.of("heartbeat")) > beats + 1)
    claims = fake.claims
    fake.status, fake.commands = "online", []
    until(lambda: fake.claims > claims + 1)


def test_a_dead_token_is_replaced_by_registering_again(fake: FakeServer, start: Callable[..., Any]) -> None:
    fake.chat_seconds = 0
    start()
    until(lambda: fake.of("complete"))
    fake.refuses_token = True
    until(lambda: fake.registered == 2)
    prints = {body["fingerprint"] for body in fake.of("register")}
    assert len(prints) == 1


def test_workers_5_a_worker_that_was_frozen_discards_its_work(
    fake: FakeServer, start: Callable[..., Any], gone: Callable[..., bool]
) -> None:
    worker = start()
    until(lambda: fake.of("completions"))
    family = [psutil.Process(worker.popen.pid), *worker.tree()]
    child = task_process(worker)
    for process in family:
        process.suspend()
    time.sleep(LEASE_SECONDS + 1)
    fake.state = "lost"
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # it was about to end when it was frozen
            process.resume()
    assert gone([child])
    time.sleep(0.5)
    assert fake.of("complete") == fake.of("fail") == fake.of("cancelled") == fake.of("release") == []


def test_nothing_outlives_a_killed_worker(
    fake: FakeServer, start: Callable[..., Any], gone: Callable[..., bool]
) -> None:
    worker = start()
    until(lambda: fake.of("completions"))
    family = worker.tree()
    os.kill(worker.popen.pid, signal.SIGKILL)
    assert gone(family, 3)
