"""R4: Redis is emptied, killed and away while clients write; nothing is lost, nobody waits, it is back by itself.

Two API processes and one of jobs. Short form: 2 clients, and away for 6 s; long form (`--long`): 4 clients, for 60 s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from tests.limits import Stopwatch

from corral.testing.database_servers import ValkeyServer
from corral.testing.server import JobsProcess, ServerProcess
from corral_core.redis.service.bus import CHANNEL

pytestmark = pytest.mark.redis

RECOVERY_SECONDS = 10.0
ENOUGH = 100  # tasks; so many are created in seconds, or later on a busy machine


class Writer(threading.Thread):
    """Creates tasks, about 20 a second, and notes what was acknowledged, what failed, and how long each took."""

    def __init__(self, server: ServerProcess, token: str, name: str, stop: threading.Event, watch: Stopwatch) -> None:
        super().__init__(daemon=True)
        self.server, self.token, self.label, self.stop, self.watch = server, token, name, stop, watch
        self.created: list[str] = []
        self.took: list[tuple[float, float]] = []  # when it began, and its time
        self.errors: list[str] = []

    def run(self) -> None:
        number = 0
        with self.server.client(self.token) as client:
            while not self.stop.wait(0.05):
                number += 1
                began, seconds = time.monotonic(), self.watch.seconds
                try:
                    answer = client.post("/tasks", json={"title": f"{self.label}-{number}"})
                    answer.raise_for_status()
                    self.created.append(answer.json()["id"])
                except httpx2.HTTPError as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                self.took.append((began, self.watch.seconds - seconds))


class Follower(threading.Thread):
    """Follows the log by long polls: `heard` are the tasks in the order of their events, `at` when."""

    def __init__(self, server: ServerProcess, token: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.token, self.stop = server, token, stop
        self.heard: list[str] = []
        self.errors: list[str] = []

    def run(self) -> None:
        after: Any = 0
        with self.server.client(self.token) as client:
            while not self.stop.is_set():
                query = {"after": after, "types": "task.created", "wait": 2, "limit": 200}
                try:
                    page = client.get("/events", params=query).raise_for_status().json()
                except httpx2.HTTPError as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    continue
                self.heard += [event["data"]["task_id"] for event in page["items"]]
                after = page["next"]


def until(condition: Callable[[], Any], seconds: float) -> float:
    with Stopwatch() as watch:
        while not condition():
            assert watch.seconds < seconds, f"not within {seconds:g} s"
            time.sleep(0.05)
    return watch.seconds


def listeners(url: str) -> int:
    """How many processes hear the bell."""
    with redis.Redis.from_url(url) as client:
        return int(dict(client.pubsub_numsub(CHANNEL))[CHANNEL.encode()])


@pytest.fixture
def fleet(database_url: str, tmp_path: Path, valkey_server: ValkeyServer) -> Iterator[list[ServerProcess]]:
    """Two API processes beside `corral jobs`."""
    environ = {
        "CORRAL_REDIS_URL": valkey_server.url(),
        "CORRAL_DATA_DIR": str(tmp_path / "data"),
        "CORRAL_ACCESS_TTL": "3600",
    }
    servers = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        arguments = ("--no-jobs", "--no-embedded-worker")
        servers.append(ServerProcess(tmp_path / name, database_url=database_url, environ=environ, arguments=arguments))
    jobs = JobsProcess(servers[0].environ, tmp_path / "jobs")
    try:
        for server in servers:
            server.start()
        jobs.start()
        yield servers
    finally:
        jobs.kill()
        for server in servers:
            server.kill()


def outages(valkey: ValkeyServer, away: float) -> dict[str, float]:
    """Empty it, restart it, take it away for a while; how long each return took until all processes heard the bell."""
    everybody = listeners(valkey.url())
    assert everybody == 3
    with redis.Redis.from_url(valkey.url()) as client:
        client.flushall()
    time.sleep(1)
    recovered = {}
    for name, seconds in (("restarted", 0.0), ("away", away)):
        valkey.kill()
        time.sleep(seconds)
        valkey.restart()
        recovered[name] = until(lambda: listeners(valkey.url()) == everybody, RECOVERY_SECONDS)
        time.sleep(1)
    return recovered


def test_r04_redis_comes_and_goes(
    fleet: list[ServerProcess], valkey_server: ValkeyServer, long_form: bool, figure: Any
) -> None:
    stop, over = threading.Event(), threading.Event()
    until(lambda: listeners(valkey_server.url()) == 3, RECOVERY_SECONDS)
    with fleet[0].sign_in() as admin, Stopwatch() as watch:
        token = admin.headers["Authorization"].removeprefix("Bearer ")
        clients = 4 if long_form else 2
        writers = [Writer(fleet[index % 2], token, f"w{index}", stop, watch) for index in range(clients)]
        followers = [Follower(server, token, over) for server in fleet]
        for thread in (*writers, *followers):
            thread.start()
        time.sleep(3 if long_form else 1.5)
        began = time.monotonic()
        recovered = outages(valkey_server, 60.0 if long_form else 6.0)
        until(lambda: sum(len(writer.created) for writer in writers) > ENOUGH, 120)
        stop.set()
        for writer in writers:
            writer.join(60)
        created = {task for writer in writers for task in writer.created}
        until(lambda: all(len(follower.heard) >= len(created) for follower in followers), 60)
        over.set()
        for follower in followers:
            follower.join(60)
        total = admin.get("/tasks", params={"limit": 1}).json()["total"]
    took = [one for writer in writers for one in writer.took]
    errors = [error for writer in writers for error in writer.errors]
    errors += [error for follower in followers for error in follower.errors]
    calm = max(seconds for start, seconds in took if start < began)
    slowest = max(seconds for start, seconds in took if start >= began)
    figures = {
        "requests": len(took),
        "errors": len(errors),
        "slowest_ms": round(slowest * 1000),
        "recovered_s": round(max(recovered.values()), 2),
        "tasks": len(created),
    }
    figure("R4", figures)
    assert len(errors) <= len(took) / 1000, errors[:3]
    assert slowest < 2.0 + calm  # what the machine itself takes is not Redis's doing
    assert len(created) > ENOUGH
    assert total == len(created)
    for follower in followers:
        assert len(follower.heard) == len(set(follower.heard)), "an event came twice"
        assert set(follower.heard) == created
    assert followers[0].heard == followers[1].heard
