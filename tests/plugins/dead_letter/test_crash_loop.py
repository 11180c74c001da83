"""Criterion 3 with real workers: each is killed by SIGKILL while it runs the same task."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.promises.test_r02_kill_the_workers import WorkerProcess

from corral.testing.server import ServerProcess

LEASE_SECONDS, WAIT_SECONDS = 10, 60.0
SLEEPER = """
[plugins.llm.scripts.sleeper]
turns = [{ delay_seconds = 600, text = "late" }]
"""


def wait_for(client: httpx2.Client, task_id: str, **wanted: Any) -> dict[str, Any]:
    """Wait until the task has these values."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        task: dict[str, Any] = client.get(f"/tasks/{task_id}").json()
        if all(task[name] == value for name, value in wanted.items()):
            return task
        assert time.monotonic() < until, (wanted, task)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.sqlite
def test_dead_letter_3_three_killed_workers_are_a_crash_loop(tmp_path: Path, long_form: bool) -> None:
    """Only in the long form, because three leases must run out. `test_done_when.py` has the short form."""
    if not long_form:
        pytest.skip("takes three leases of 10 s; runs with --long")
    (tmp_path / "corral.toml").write_text(SLEEPER)
    environ = {"CORRAL_CONFIG": str(tmp_path / "corral.toml"), "CORRAL_TASK_LEASE_SECONDS": str(LEASE_SECONDS)}
    with ServerProcess(tmp_path, environ=environ) as server, server.sign_in() as client:
        agent = client.post("/agents", json={"name": "sleeper", "llm_provider": "scripted", "llm_model": "sleeper"})
        client.post(f"/agents/{agent.json()['id']}/start").raise_for_status()
        made = client.post("/admin/registration-keys", json={"name": "site", "auto_approve": True})
        body = {"title": "doomed", "agent_id": agent.json()["id"], "retry_policy": {"max_attempts": 10}}
        task_id = client.post("/tasks", json=body).raise_for_status().json()["id"]
        for number in range(1, 4):
            worker = WorkerProcess(server, tmp_path, f"w{number}", made.json()["key"])
            worker.start()
            try:
                wait_for(client, task_id, status="running", attempt=number)
            finally:
                worker.kill()
            wait_for(client, task_id, status="pending" if number < 3 else "failed")
        (letter,) = client.get("/dead-letter").json()["items"]
        assert (letter["task_id"], letter["reason"]) == (task_id, "crash_loop")
        attempts = client.get(f"/dead-letter/{letter['id']}").json()["attempts"]
        assert len({each["worker_id"] for each in attempts}) == 3
