"""R2: workers are killed by SIGKILL, and frozen for longer than their leases, at random. Every task ends, none is
started after it was completed, every stale call is refused, and lost leases are reclaimed in time.

Short form: 60 tasks, 3 workers, 3 kills and a freeze on each engine; long form (`--long`): 10,000 tasks, 8 workers, 200
kills and freezes.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
from tests.promises.test_r01_kill_the_server import read_log

from corral import clock
from corral.testing import server
from corral.testing.server import ServerProcess

LEASE_SECONDS = 10
RECLAIM_SECONDS = LEASE_SECONDS + 5
FREEZE_SECONDS = RECLAIM_SECONDS + 1
TERMINAL = {"task.completed", "task.failed", "task.cancelled"}


class WorkerProcess:
    """`corral worker` with a folder of its own, so that a restart is the same worker."""

    def __init__(self, site: ServerProcess, folder: Path, name: str, key: str) -> None:
        self.site, self.folder, self.name = site, folder / name, name
        self.folder.mkdir()
        self.environ = {**os.environ, "CORRAL_WORKER_TOKEN": key}
        self.process: Any = None
        self.interrupted: list[float] = []  # when it was killed or frozen
        self.frozen: list[psutil.Process] = []

    def start(self) -> None:
        command = ["worker", "--url", self.site.address, "--name", self.name]
        command += ["--max-agents", "2", "--dir", str(self.folder)]
        log = self.folder / "worker.log"
        self.process = server.start_process(command, environ=self.environ, folder=self.folder, log=log)

    def kill(self) -> None:
        assert self.process is not None
        self.interrupted.append(time.time())
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.thaw()

    def freeze(self) -> None:
        """Stop the worker and the processes of its tasks, as if the machine had been suspended."""
        self.interrupted.append(time.time())
        root = psutil.Process(self.process.pid)
        self.frozen = [root, *root.children(recursive=True)]
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let everything that was frozen go on."""
        self._signal(signal.SIGCONT)
        self.frozen = []

    @property
    def has_slept(self) -> bool:
        """Whether the worker has been frozen for longer than a lease lasts."""
        return bool(self.frozen) and time.time() - self.interrupted[-1] > FREEZE_SECONDS

    def _signal(self, number: int) -> None:
        for process in self.frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class SilentWorker:
    """A worker that starts tasks, is never heard of again, and reports when their leases have long ended."""

    def __init__(self, site: ServerProcess, key: str, tasks: int) -> None:
        with site.client(key) as registering:
            made = registering.post("/workers/register", json={"name": "silent", "max_agents": tasks})
        self.client = site.client(made.raise_for_status().json()["token"])
        claim = self.client.post(f"/workers/{made.json()['id']}/claim", json={"max_tasks": tasks, "wait_seconds": 5})
        self.leases = {each["task"]["id"]: each["lease_id"] for each in claim.raise_for_status().json()["tasks"]}
        assert len(self.leases) == tasks
        for task in self.leases:
            assert self._call(task, "start").status_code == 200
        self.heard = time.time()

    def report_late(self) -> dict[str, int]:
        """Make every call that ends a task, and those that do not, under each of the old leases: all are refused."""
        bodies: dict[str, Any] = {
            "complete": {"result": {"text": "too late"}},
            "fail": {"error": {"type": "late", "message": "too late"}},
            "progress": {"percent": 99},
            "checkpoint": {"step": 99, "state": {}},
            "release": {"reason": "too late"},
        }
        refused = 0
        for task in self.leases:
            for call, body in bodies.items():
                answer = self._call(task, call, body)
                assert (answer.status_code, answer.json().get("code")) == (409, "lease_lost"), (call, answer.text)
                refused += 1
        return {"stale_calls": refused, "stale_calls_refused": refused}

    def _call(self, task: str, call: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        return self.client.post(f"/tasks/{task}/{call}", json={"lease_id": self.leases[task], **(body or {})})


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


def reclaim_seconds(admin: httpx2.Client, silent: SilentWorker, fleet: list[WorkerProcess]) -> list[float]:
    """How long each lost lease stood after its worker was last able to renew it."""
    named = {item["id"]: item["name"] for item in admin.get("/workers?limit=200").json()["items"]}
    interrupted = {worker.name: worker.interrupted for worker in fleet} | {"silent": [silent.heard]}
    found = []
    for event in read_log(admin):
        if event["event"] == "task.retried" and event["data"]["reason"] == "lease_lost":
            ended = clock.parse_instant(event["ts"])
            moments = [moment for moment in interrupted[named[event["data"]["worker_id"]]] if moment < ended]
            assert moments, f"the lease of a worker that nobody stopped was reclaimed: {event}"
            found.append(ended - moments[-1])
    return found


def interrupt(fleet: list[WorkerProcess], *, freeze: bool) -> None:
    """Kill and restart a worker, or freeze one, and thaw those that have slept long enough."""
    awake = [worker for worker in fleet if not worker.frozen]
    victim = random.choice(awake)
    if freeze and len(awake) > len(fleet) // 2:
        victim.freeze()
    else:
        victim.kill()
        victim.start()
    for worker in fleet:
        if worker.has_slept:
            worker.thaw()


def test_r02_workers_2_every_task_ends_whatever_dies(
    database_url: str, tmp_path: Path, long_form: bool, figure: Any
) -> None:
    random.seed(7)
    tasks, workers, interruptions, silent_tasks = (10_000, 8, 200, 40) if long_form else (60, 3, 4, 3)
    environ = {"CORRAL_TASK_LEASE_SECONDS": str(LEASE_SECONDS), "CORRAL_ACCESS_TTL": "3600"}
    site = ServerProcess(tmp_path, database_url=database_url, environ=environ)
    fleet: list[WorkerProcess] = []
    with site:
        try:
            admin = site.sign_in()
            key = prepare(site, admin, tasks)
            made = admin.post("/security/api-keys", json={"name": "judge", "scopes": ["*"]}).raise_for_status()
            admin = site.client(made.json()["key"])  # the long form takes longer than an access token lasts
            silent = SilentWorker(site, key, silent_tasks)
            fleet = [WorkerProcess(site, tmp_path, f"w{index}", key) for index in range(workers)]
            for worker in fleet:
                worker.start()
            for turn in range(interruptions):
                time.sleep(random.uniform(0.5, 2.0))
                interrupt(fleet, freeze=turn % 2 == 1 if long_form else turn == 1)
            until = time.monotonic() + (3600 if long_form else 300)
            while ((left := open_tasks(admin)) or any(worker.frozen for worker in fleet)) and time.monotonic() < until:
                time.sleep(0.5)
                for worker in fleet:
                    if worker.has_slept:
                        worker.thaw()
            assert left == 0, f"{left} tasks have not ended\n{site.log[-3000:]}"
            assert time.time() - silent.heard > RECLAIM_SECONDS
            figures: dict[str, Any] = {**judge(admin, tasks), **silent.report_late()}
            reclaimed = reclaim_seconds(admin, silent, fleet)
            text = admin.get(f"{site.address}/metrics").text
            stale = re.search(r'^corral_stale_calls_total\{call="complete"\} (\S+)$', text, re.MULTILINE)
            assert stale is not None
            assert float(stale[1]) >= silent_tasks  # a worker that was frozen may report late, too
        finally:
            for worker in fleet:
                worker.kill()
    assert len(reclaimed) >= silent_tasks
    slowness = 0.0 if long_form else os.getloadavg()[0]  # a crowded machine is slow by itself
    assert max(reclaimed) <= RECLAIM_SECONDS + slowness
    figures |= {"workers": workers, "interruptions": interruptions, "reclaim_s": round(max(reclaimed), 1)}
    figure("R2", figures)
