"""Many processes, one installation: two API processes, two of jobs, four workers, on PostgreSQL and Valkey."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from tests.end_to_end.waiting_claims import check_new_tasks_reach_waiting_claims
from tests.promises.test_r01_kill_the_server import read_log
from tests.promises.test_r02_kill_the_workers import LEASE_SECONDS, WorkerProcess, judge, open_tasks, prepare
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from corral import clock
from corral.testing.database_servers import PostgresServer, ValkeyServer
from corral.testing.server import JobsProcess, ServerProcess

Process = ServerProcess | JobsProcess | WorkerProcess

pytestmark = [pytest.mark.postgres, pytest.mark.redis]

TASKS, KILLS = 60, 4


class Fleet:
    """All of it; `with` it runs."""

    def __init__(self, folder: Path, database_url: str, redis_url: str) -> None:
        self.folder = folder
        environ = {
            "CORRAL_REDIS_URL": redis_url,
            "CORRAL_DATA_DIR": str(folder / "data"),
            "CORRAL_ACCESS_TTL": "3600",
            "CORRAL_TASK_LEASE_SECONDS": str(LEASE_SECONDS),
        }
        self.servers = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            arguments = ("--no-jobs", "--no-embedded-worker")
            self.servers.append(
                ServerProcess(folder / name, database_url=database_url, environ=environ, arguments=arguments)
            )
        self.jobs = [JobsProcess(self.servers[0].environ, folder / f"jobs{number}") for number in range(2)]
        self.workers: list[WorkerProcess] = []

    def add_workers(self, key: str, count: int = 4) -> None:
        """Half of them at each server."""
        for number in range(count):
            worker = WorkerProcess(self.servers[number % 2], self.folder, f"w{number}", key)
            self.workers.append(worker)
            worker.start()

    def __enter__(self) -> Fleet:
        try:
            started: list[Process] = [*self.servers, *self.jobs]
            for process in started:
                process.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        ended: list[Process] = [*self.workers, *self.jobs, *self.servers]
        for process in ended:
            process.kill()


class Viewer(threading.Thread):
    """A `/ws` client of one server that comes back with its cursor whenever it is cut."""

    def __init__(self, server: ServerProcess, token: str) -> None:
        super().__init__(daemon=True)
        self.address = f"{server.address.replace('http', 'ws', 1)}/ws?token={token}"
        self.seen: list[int] = []
        self.cuts = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError, WebSocketException):
                self._watch()
            self.cuts += 1
            time.sleep(0.1)

    def _watch(self) -> None:
        with connect(self.address, proxy=None, compression=None) as socket:
            since = self.seen[-1] if self.seen else 0
            socket.send(json.dumps({"type": "subscribe", "event": "task.*", "since": since}))
            while not self.over.is_set():
                with contextlib.suppress(TimeoutError):
                    frame = json.loads(socket.recv(timeout=0.2))
                    if frame["type"] == "event":
                        self.seen.append(frame["seq"])


@pytest.fixture
def fleet(tmp_path: Path, postgres_server: PostgresServer, valkey_server: ValkeyServer) -> Iterator[Fleet]:
    url = postgres_server.create_database()
    with Fleet(tmp_path, url, valkey_server.url()) as running:
        yield running
    postgres_server.drop_database(url)


def wait_until_all_end(admin: httpx2.Client, seconds: float) -> None:
    until = time.monotonic() + seconds
    while left := open_tasks(admin):
        assert time.monotonic() < until, f"{left} tasks have not ended"
        time.sleep(0.25)


def test_every_task_completes_whoever_is_killed_and_every_viewer_sees_it(fleet: Fleet) -> None:
    """An API process, a jobs process and workers are killed at random."""
    random.seed(11)
    first, second = fleet.servers
    admin = first.sign_in()
    token = admin.headers["Authorization"].removeprefix("Bearer ")
    viewers = [Viewer(server, token) for server in fleet.servers]
    for viewer in viewers:
        viewer.start()
    fleet.add_workers(prepare(first, admin, TASKS))
    victims: list[Process] = [fleet.workers[0], fleet.jobs[0], second, *random.choices(fleet.workers, k=KILLS - 3)]
    for victim in victims:
        time.sleep(random.uniform(0.5, 1.5))
        victim.kill()
        victim.start()
    wait_until_all_end(admin, 300)
    judge(admin, TASKS)
    expected = [event["seq"] for event in read_log(admin) if event["event"].startswith("task.")]
    until = time.monotonic() + 60
    while any(viewer.seen[-1:] != expected[-1:] for viewer in viewers) and time.monotonic() < until:
        time.sleep(0.1)
    for viewer in viewers:
        viewer.over.set()
        viewer.join(60)
        assert viewer.seen == expected
    assert viewers[1].cuts > 1


def test_workers_7_a_new_task_reaches_a_claim_at_another_server(
    tmp_path: Path, postgres_server: PostgresServer, valkey_server: ValkeyServer
) -> None:
    """Two servers on one PostgreSQL: without Redis, and then with it."""
    url = postgres_server.create_database()
    for name, environ in (("alone", {}), ("redis", {"CORRAL_REDIS_URL": valkey_server.url()})):
        with contextlib.ExitStack() as stack:
            servers = []
            for number in range(2):
                (folder := tmp_path / f"{name}{number}").mkdir()
                common = {"CORRAL_DATA_DIR": str(tmp_path / "data"), **environ}
                server = ServerProcess(folder, database_url=url, environ=common)
                servers.append(stack.enter_context(server))
            with servers[0].sign_in() as admin:
                check_new_tasks_reach_waiting_claims(servers[0], servers[1], admin, name=name)
    postgres_server.drop_database(url)


def test_tasks_8_redis_flushed_under_load(fleet: Fleet, valkey_server: ValkeyServer) -> None:
    """No task is lost; none waits more than 5 s because of it."""
    with fleet.servers[0].sign_in() as admin:
        fleet.add_workers(prepare(fleet.servers[0], admin, 8), 2)
        wait_until_all_end(admin, 120)  # the workers are there
        agent = admin.get("/agents").json()["items"][0]["id"]
        with redis.Redis.from_url(valkey_server.url()) as client:
            for number in range(20):
                body = {"title": f"under load {number}", "instructions": "hello", "agent_id": agent}
                admin.post("/tasks", json=body).raise_for_status()
                client.flushall()
                time.sleep(0.1)
        wait_until_all_end(admin, 120)
        judge(admin, 28)
        created: dict[str, float] = {}
        waited: list[float] = []
        for event in read_log(admin):
            if event["event"] == "task.created":
                created[event["data"]["task_id"]] = clock.parse_instant(event["ts"])
            elif event["event"] == "task.assigned":
                waited.append(clock.parse_instant(event["ts"]) - created[event["data"]["task_id"]])
    assert len(waited) == 28
    assert max(waited[8:]) < 5.0 + os.getloadavg()[0]  # a crowded machine is slow by itself
