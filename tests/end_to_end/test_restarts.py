"""What must hold across a death of the server: a cancel is heard, a drain cuts nobody."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.promises.test_r02_kill_the_workers import WorkerProcess

from corral.testing.server import ServerProcess


def wait_for(client: httpx2.Client, path: str, statuses: set[str], seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    told: Any = None
    while time.monotonic() < until:
        with contextlib.suppress(httpx2.TransportError):
            answer = client.get(path)
            told = answer.status_code, answer.text
            if answer.is_success and answer.json()["status"] in statuses:
                found: dict[str, Any] = answer.json()
                return found
        time.sleep(0.1)
    raise AssertionError(f"{path} did not become {statuses} within {seconds:g} s; at last: {told}")


def test_tasks_5_a_cancel_is_heard_across_a_sigkill_of_the_server(database_url: str, tmp_path: Path) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps({"turns": [{"text": "too late", "delay_seconds": 120}]}))
    config = tmp_path / "corral.toml"
    config.write_text(f'[plugins.llm.scripts]\nslow = "{slow}"\n')
    server = ServerProcess(tmp_path, database_url=database_url, environ={"CORRAL_CONFIG": str(config)})
    worker: WorkerProcess | None = None
    with server:
        try:
            admin = server.sign_in()
            agent = admin.post("/agents", json={"name": "slow", "llm_model": "scripted/slow"}).raise_for_status().json()
            admin.post(f"/agents/{agent['id']}/start").raise_for_status()
            key = admin.post("/admin/registration-keys", json={"name": "k", "auto_approve": True}).json()["key"]
            worker = WorkerProcess(server, tmp_path, "w", key)
            worker.start()
            task = admin.post("/tasks", json={"title": "long", "agent_id": agent["id"]}).raise_for_status().json()
            path = f"/tasks/{task['id']}"
            wait_for(admin, path, {"running"}, 60)
            answer = admin.post(f"{path}/cancel", json={"reason": "changed my mind"})
            assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")
            server.kill()
            server.start()
            ended = wait_for(admin, path, {"cancelled"}, 60)
            assert ended["result"] is None
            assert admin.post(f"{path}/cancel").json()["status"] == "cancelled"
        finally:
            if worker is not None:
                worker.kill()


@pytest.mark.parametrize("server_name", ["hypercorn", "uvicorn"])
def test_sigterm_answers_or_refuses_new_connections(tmp_path: Path, server_name: str) -> None:
    """A request on a connection of its own is not accepted and then cut."""
    answers: Counter[str] = Counter()
    request = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            except OSError:
                answers["refused"] += 1
                time.sleep(0.05)
                continue
            with connection:
                try:
                    connection.sendall(request)
                    answers[connection.recv(100)[9:12].decode() or "cut"] += 1
                except OSError:
                    answers["cut"] += 1

    server = ServerProcess(tmp_path, arguments=("--no-embedded-worker", "--server", server_name))
    with server:
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        patience = time.monotonic() + 60
        while answers["200"] <= 100:
            assert time.monotonic() < patience, answers
            time.sleep(0.05)
        assert server.stop() == 0
        stop.set()
        for thread in threads:
            thread.join()
    assert set(answers) <= {"200", "503", "refused"}
