"""R8: SIGTERM, and SIGHUP, while clients write: the server drains in time and cuts no request.

Short form, without an embedded worker: one SIGTERM and one SIGHUP of two processes, and one SIGTERM of one. Long form
(`--long`): 20 of each.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from corral.testing.server import ServerProcess

pytestmark = pytest.mark.one_engine

CLIENTS = 8


class Writers:
    """Clients that create tasks until the server refuses them, half of them with a connection for each request."""

    def __init__(self, server: ServerProcess, token: str) -> None:
        self.server, self.token = server, token
        self.answers: Counter[int] = Counter()
        self.cut: list[str] = []
        self.stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(bool(n % 2),)) for n in range(CLIENTS)]

    def _write(self, keeps_connection: bool) -> None:
        client = self.server.client(self.token)
        while not self.stop.is_set():
            try:
                self.answers[client.post("/tasks", json={"title": "kept"}).status_code] += 1
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                break  # refused: no request was begun
            except httpx2.HTTPError as error:
                self.cut.append(f"{type(error).__name__}: {error}")
            if not keeps_connection:
                client.close()
                client = self.server.client(self.token)
        client.close()

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("processes", [1, 2])
def test_r08_sigterm_and_sighup_cut_no_request(
    database_url: str, tmp_path: Path, processes: int, long_form: bool, figure: Any
) -> None:
    arguments = ("--processes", str(processes), *(() if long_form else ("--no-embedded-worker",)))
    server = ServerProcess(
        tmp_path, database_url=database_url, arguments=arguments, environ={"CORRAL_ACCESS_TTL": "3600"}
    )
    rounds = 20 if long_form else 1
    written, cut, slowest = 0, [], 0.0
    with server:
        token = server.sign_in().headers["Authorization"].removeprefix("Bearer ")
        for _ in range(rounds):
            with Writers(server, token) as writers:
                time.sleep(1)
                if processes > 1 or long_form:
                    assert server.process is not None
                    known = server.log.count('"reloaded"')
                    server.process.send_signal(signal.SIGHUP)
                    while server.log.count('"reloaded"') == known:
                        time.sleep(0.1)
                    time.sleep(0.5)
                began = time.monotonic()
                assert server.stop() == 0
                slowest = max(slowest, time.monotonic() - began)
            written += writers.answers.pop(201)
            cut += writers.cut
            assert set(writers.answers) <= {503}
            server.start()
        with server.sign_in() as admin:
            kept = admin.get("/tasks", params={"limit": 1}).json()["total"]
        assert server.stop() == 0
    assert cut == []
    assert kept == written  # every task that was committed was answered
    assert slowest <= 30
    figure(f"R8 {processes}", {"rounds": rounds, "written": written, "cut": len(cut), "slowest_s": round(slowest, 1)})
