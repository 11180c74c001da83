"""R2: workers are killed by SIGKILL at random; every task ends, none is started after it was completed, stale leases
change nothing.

Short form: 60 tasks, 3 workers, 3 kills on each engine; long form (`--long`): 1,000 tasks, 8 workers, 20 kills.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
from tests.promises.test_r01_kill_the_server import read_log

from corral.testing import server
from corral.testing.server import ServerProcess

LEASE_SECONDS = 10
TERMINAL = {"task.completed", "task.failed", "task.cancelled"}


class WorkerProcess:
    """`corral worker` with a folder of its own, so that a restart is the same worker."""

    def __init__(self, site: ServerProcess, folder: Path, name: str, key: str) -> None:
        self.site, self.folder, self.name = site, folder / name, name
        self.folder.mkdir()
        self.environ = {**os.environ, "CORRAL_WORKER_TOKEN": key}
        self.process: Any = None

    def start(self) -> None:
        command = ["worker", "--url", self.site.address, "--name", self.name]
        command += ["--max-agents", "2", "--dir", str(self.folder)]
        log = self.folder / "worker.log"
        self.process = server.start_process(command, environ=self.environ, folder=self.folder, log=log)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def prepare(site: ServerProcess, admin: httpx2.Client, tasks: int) -> str:
    """Four agents, so many tasks, and a registration key; returns the key."""
    agents = []
    for index in range(4):
        body = {"name": f"agent {index}", "max_concurrent_tasks": 10, "config": {"max_tokens": 200}}
        agent = admin.post("/agents", json=body).raise_for_status().json()
        admin.post(f"/agents/{agent['id']}/start").raise_for_status()
        agents.append(agent["id"])
    for index in range(tasks):
        body = {"title": f"task {index}", "instructions": f"say {index}", "agent_id": agents[index % 4]}
        admin.post(
            "/tasks", json={**body, "retry_policy": {"max_attempts": 50, "initial_seconds": 0}}
        ).raise_for_status()
    key = admin.post("/admin/registration-keys", json={"name": "fleet", "auto_approve": True}).raise_for_status().json()
    return str(key["key"])


def open_tasks(admin: httpx2.Client) -> int:
    stats = admin.get("/tasks/stats").raise_for_status().json()["by_status"]
    return sum(count for status, count in stats.items() if status not in ("completed", "failed", "cancelled"))


def judge(admin: httpx2.Client, tasks: int) -> dict[str, int]:
    stats = admin.get("/tasks/stats").json()
    assert stats["by_status"]["completed"] == tasks, stats
    ended: dict[str, str] = {}
    reclaimed = 0
    for event in read_log(admin):
        if not event["event"].startswith("task."):
            continue
        task = event["data"]["task_id"]
        if event["event"] in ("task.assigned", "task.started"):
            assert task not in ended, f"{task} was {event['event']} after {ended[task]}"
        if event["event"] == "task.retried":
            reclaimed += 1
        if event["event"] in TERMINAL:
            assert task not in ended, f"{task} ended twice"
            ended[task] = event["event"]
    assert len(ended) == tasks
    return {"completed": tasks, "retried": reclaimed}


def test_r02_every_task_ends_whatever_dies(database_url: str, tmp_path: Path, long_form: bool, figure: Any) -> None:
    random.seed(7)
    tasks, workers, kills = (1000, 8, 20) if long_form else (60, 3, 3)
    environ = {"CORRAL_TASK_LEASE_SECONDS": str(LEASE_SECONDS), "CORRAL_ACCESS_TTL": "3600"}
    site = ServerProcess(tmp_path, database_url=database_url, environ=environ)
    fleet: list[WorkerProcess] = []
    with site:
        try:
            admin = site.sign_in()
            key = prepare(site, admin, tasks)
            fleet = [WorkerProcess(site, tmp_path, f"w{index}", key) for index in range(workers)]
            for worker in fleet:
                worker.start()
            for _ in range(kills):
                time.sleep(random.uniform(0.5, 2.0))
                victim = random.choice(fleet)
                victim.kill()
                victim.start()
            until = time.monotonic() + (600 if long_form else 120)
            while (left := open_tasks(admin)) and time.monotonic() < until:
                time.sleep(0.5)
            assert left == 0, f"{left} tasks have not ended\n{site.log[-3000:]}"
            figures = judge(admin, tasks)
        finally:
            for worker in fleet:
                worker.kill()
    figure("R2", {**figures, "workers": workers, "kills": kills})
