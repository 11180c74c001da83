"""R1: the server is killed by SIGKILL while clients write; nothing that was acknowledged is lost, nothing is there
by half.

Short form: 3 kills on SQLite, 2 on PostgreSQL with 8 clients; long form (`--long`): 100 and 50 with 50 clients. The
history of every client is on disk before the next request leaves; in-flight requests may have gone either way. The time
until the server is ready is judged without the time that it waited for a core, which the clients and other tests use.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sqlite3
import threading
import time
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.limits import Stopwatch

from corral.testing.server import ServerProcess

READY_MS = 3000
RECOVERY_SECONDS = 10.0


class Writer(threading.Thread):
    """Creates tasks with its own names, patches some, and writes down what was acknowledged."""

    def __init__(self, server: ServerProcess, token: str, name: str, folder: Path, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.token, self.label, self.stop = server, token, name, stop
        self.history = (folder / f"{name}.jsonl").open("a", buffering=1)
        self.created: dict[str, str] = {}
        self.patched: dict[str, str] = {}
        self.unexpected: list[str] = []
        self.disconnected, self.refused = 0, 0
        self.wrote = 0.0  # when the last write was acknowledged, by the monotonic clock

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            try:
                with self.server.client(self.token) as client:
                    while not self.stop.is_set():
                        number += 1
                        self._once(client, f"{self.label}-{number}")
            except httpx2.HTTPError:
                self.disconnected += 1
                time.sleep(0.2)

    def _once(self, client: httpx2.Client, title: str) -> None:
        answer = client.post("/tasks", json={"title": title})
        if answer.status_code == 201:
            identifier = answer.json()["id"]
            self._acknowledged("created", identifier, title)
            self.created[identifier] = title
            if random.random() < 0.3:
                changed = client.patch(f"/tasks/{identifier}", json={"title": f"{title}!"})
                if changed.status_code == 200:
                    self._acknowledged("patched", identifier, f"{title}!")
                    self.patched[identifier] = f"{title}!"
        elif answer.status_code == 503 and int(answer.headers.get("retry-after", 0)) > 0:
            self.refused += 1
            time.sleep(0.05)
        else:
            self.unexpected.append(f"{answer.status_code} {answer.headers} {answer.text[:200]}")

    def _acknowledged(self, what: str, identifier: str, title: str) -> None:
        self.history.write(json.dumps([what, identifier, title]) + "\n")
        self.history.flush()
        os.fsync(self.history.fileno())
        self.wrote = time.monotonic()


def waited_for_a_core(server: ServerProcess) -> float:
    """How long the main thread of the server was able to run, and had no core to run on, in milliseconds."""
    assert server.process is not None
    with contextlib.suppress(FileNotFoundError):  # only Linux tells
        return int(Path(f"/proc/{server.process.pid}/schedstat").read_text("ascii").split()[1]) / 1e6
    return 0.0


def p95(values: list[float]) -> int:
    """The 95th percentile, by the nearest rank."""
    return round(sorted(values)[math.ceil(0.95 * len(values)) - 1])


def read_log(client: httpx2.Client) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    after: Any = "0"
    while True:
        page = client.get("/events", params={"after": after, "limit": 200}).json()
        if not page["items"]:
            return events
        events += page["items"]
        after = page["next"]


def wait_until_numbered(client: httpx2.Client, identifiers: AbstractSet[str]) -> None:
    """Wait until the log has the events of all these tasks, at most as long as a recovery may take.

    On PostgreSQL the sequencer numbers what a kill or a full disk left, and begins again after a pause.
    """
    with Stopwatch() as watch:
        while watch.seconds < RECOVERY_SECONDS:
            created = {event["data"]["task_id"] for event in read_log(client) if event["event"] == "task.created"}
            if identifiers <= created:
                return
            time.sleep(0.2)


def until_written(writers: list[Writer], count: int) -> None:
    """Wait until more than `count` writes were acknowledged, which takes longer on a busy machine."""
    patience = time.monotonic() + 120
    while sum(len(writer.created) for writer in writers) <= count:
        assert time.monotonic() < patience, "the clients do not write"
        time.sleep(0.05)


def judge(server: ServerProcess, writers: list[Writer]) -> dict[str, int]:
    """Every acknowledged write is there, whole, with its events, in order."""
    with server.sign_in() as client:
        acknowledged = {key: title for writer in writers for key, title in writer.created.items()}
        wait_until_numbered(client, acknowledged.keys())
        events = read_log(client)
        numbers = [event["seq"] for event in events]
        assert numbers == sorted(set(numbers)), "the event log is out of order"
        created = [event["data"]["task_id"] for event in events if event["event"] == "task.created"]
        assert len(created) == len(set(created)), "an event is there twice"
        lost = acknowledged.keys() - set(created)
        assert not lost, f"{len(lost)} acknowledged tasks have no event"
        total = client.get("/tasks", params={"limit": 1}).json()["total"]
        assert total == len(created), "tasks and their events differ: a unit was committed by half"
        stats = client.get("/tasks/stats").json()
        assert stats["total"] == total, "the counters do not fit the rows"
        patched = {key: title for writer in writers for key, title in writer.patched.items()}
        for identifier in random.sample(sorted(acknowledged), min(200, len(acknowledged))):
            answer = client.get(f"/tasks/{identifier}")
            assert answer.status_code == 200, f"an acknowledged task is lost: {identifier}"
            expected = patched.get(identifier, acknowledged[identifier])
            assert answer.json()["title"] in (expected, f"{acknowledged[identifier]}!")
        return {"acknowledged": len(acknowledged), "patched": len(patched), "events": len(events)}


def test_r01_an_acknowledged_write_survives_sigkill(
    database_url: str, tmp_path: Path, long_form: bool, figure: Any
) -> None:
    sqlite = database_url.startswith("sqlite")
    kills = (100 if sqlite else 50) if long_form else (3 if sqlite else 2)
    clients = 50 if long_form else 8
    server = ServerProcess(
        tmp_path, database_url=database_url, environ={"CORRAL_ACCESS_TTL": "3600"}, arguments=("--no-embedded-worker",)
    )
    stop = threading.Event()
    if not sqlite:
        server.environ["CORRAL_DATABASE_URL"] = database_url
    server.start()
    own_ms: list[float] = []
    try:
        with server.sign_in() as admin:
            admin.put("/settings/tasks/max_open_per_user", json={"value": 1_000_000}).raise_for_status()
            token = admin.headers["Authorization"].removeprefix("Bearer ")
        writers = [Writer(server, token, f"w{index}", tmp_path, stop) for index in range(clients)]
        for writer in writers:
            writer.start()
        for _ in range(kills):
            time.sleep(random.uniform(0.3, 1.2))
            server.kill()
            if sqlite:
                path = database_url.removeprefix("sqlite:///")
                with sqlite3.connect(path) as connection:
                    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            server.start()
            own_ms.append(server.ready_ms[-1] - waited_for_a_core(server))
        time.sleep(0.5)
        stop.set()
        for writer in writers:
            writer.join(60)
        assert [fault for writer in writers for fault in writer.unexpected] == []
        figures = judge(server, writers)
    finally:
        stop.set()
        server.kill()
    figures |= {
        "kills": kills,
        "clients": clients,
        "ready_p95_ms": p95(own_ms),
        "busy_p95_ms": p95([*server.ready_ms[1:]]),
    }
    figure("R1", figures)
    assert figures["acknowledged"] > 20 * kills
    assert figures["ready_p95_ms"] <= READY_MS


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(20)
