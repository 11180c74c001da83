"""R6: 64 clients write to one SQLite file through two processes, without a pause: no client sees a lock error, writes
are acknowledged soon, and `/health` answers as if nothing happened.

Short form: 5 s, and the times are judged only by what a busy machine can hold; long form (`--long`): 5 min.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
from tests.benchmarks.servers import HERE, request_bytes
from tests.engines import SQLITE

from corral.testing.server import ServerProcess

WRITERS = 64
WRITE_P99_MS, HEALTH_P99_MS = 250.0, 50.0


class HealthClient(threading.Thread):
    """Asks for `/health` twenty times a second, and notes how long each answer took."""

    def __init__(self, server: ServerProcess, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.stop = server, stop
        self.took_ms: list[float] = []
        self.faults: list[str] = []

    def run(self) -> None:
        with self.server.client() as client:
            while not self.stop.wait(0.05):
                began = time.perf_counter()
                try:
                    client.get(f"{self.server.address}/health").raise_for_status()
                except httpx2.HTTPError as error:
                    self.faults.append(f"{type(error).__name__}: {error}")
                self.took_ms.append((time.perf_counter() - began) * 1000)


def write(server: ServerProcess, token: str, seconds: float) -> dict[str, Any]:
    """Create tasks over 64 connections at once; the figures of `tests/benchmarks/load.py`, a process of its own."""
    request = request_bytes("POST", "/api/v1/tasks", {"title": "one of many"}, token)
    job = {
        "port": server.port,
        "connections": WRITERS,
        "accept": [201],
        "requests": [base64.b64encode(request).decode()],
        "seconds": seconds,
    }
    load = [sys.executable, "-IS", str(HERE / "load.py")]
    done = subprocess.run(load, input=json.dumps(job).encode(), stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@SQLITE
def test_r06_sixty_four_sqlite_writers(unmade_database_url: str, tmp_path: Path, long_form: bool, figure: Any) -> None:
    arguments = ("--processes", "2", "--no-embedded-worker")
    stop = threading.Event()
    with (
        ServerProcess(tmp_path, database_url=unmade_database_url, arguments=arguments) as server,
        server.sign_in() as admin,
    ):
        token = admin.headers["Authorization"].removeprefix("Bearer ")
        health = HealthClient(server, stop)
        health.start()
        written = write(server, token, 300.0 if long_form else 5.0)
        stop.set()
        health.join(10)
        kept = server.sign_in().get("/tasks", params={"limit": 1}).json()["total"]
    took = sorted(health.took_ms)
    figures = {
        "writers": WRITERS,
        "written": written["count"],
        "refused": written["unexpected"],
        "write_p99_ms": round(written["p99_ms"], 1),
        "health_p99_ms": round(took[len(took) * 99 // 100], 1),
    }
    figure("R6", figures)
    assert written["unexpected"] == 0, written["sample"]
    assert health.faults == []
    assert kept == written["count"]
    assert "database is locked" not in server.log
    patience = 1 if long_form else 10  # the suite shares its cores
    assert figures["write_p99_ms"] <= WRITE_P99_MS * patience
    assert figures["health_p99_ms"] <= HEALTH_P99_MS * patience
