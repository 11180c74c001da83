"""R5: PostgreSQL is restarted, and killed, while clients write: requests get 503 with `Retry-After` until it is back,
nothing that was acknowledged is lost, and the server goes on by itself, with the same processes.

Short form: 2 restarts with 8 clients; long form (`--long`): 10 with 50 clients. Every other one is a SIGKILL.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from tests.engines import POSTGRES
from tests.limits import Stopwatch
from tests.promises.test_r01_kill_the_server import Writer, judge, until_written

from corral.testing.database_servers import PostgresServer
from corral.testing.server import ServerProcess

RECOVERY_SECONDS = 10.0


class Reader(threading.Thread):
    """Asks for what needs the database and for what does not, and counts the answers."""

    def __init__(self, server: ServerProcess, token: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.token, self.stop = server, token, stop
        self.answers: Counter[tuple[str, int, bool]] = Counter()
        self.errors: list[str] = []

    def run(self) -> None:
        with self.server.client(self.token) as client:
            while not self.stop.wait(0.05):
                for path in ("/tasks", f"{self.server.address}/health"):
                    try:
                        answer = client.get(path)
                    except httpx2.HTTPError as error:
                        self.errors.append(f"{type(error).__name__}: {error}")
                        continue
                    told = int(answer.headers.get("retry-after", 0)) > 0
                    self.answers[path.rpartition("/")[2], answer.status_code, told] += 1


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that this test may kill."""
    with PostgresServer() as started:
        yield started


def restart(postgres: PostgresServer, writers: list[Writer], *, kill: bool) -> float:
    """Take PostgreSQL away for a second; how long after its return it took until every client had written again."""
    if kill:
        postgres.kill()
        time.sleep(1)
    postgres.restart()
    back = time.monotonic()
    with Stopwatch() as watch:
        while not all(writer.wrote > back for writer in writers):
            assert watch.seconds < RECOVERY_SECONDS, "the clients could not write again in time"
            time.sleep(0.02)
    return watch.seconds


def processes(server: ServerProcess) -> set[tuple[int, float]]:
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    return {(each.pid, each.create_time()) for each in (root, *root.children(recursive=True))}


@POSTGRES
def test_r05_postgres_is_restarted_under_load(
    database_url: str, own_postgres: PostgresServer, tmp_path: Path, long_form: bool, figure: Any
) -> None:
    restarts, clients = (10, 50) if long_form else (2, 8)
    url, stop = own_postgres.create_database(), threading.Event()
    with ServerProcess(tmp_path, database_url=url, environ={"CORRAL_ACCESS_TTL": "3600"}) as server:
        token = server.sign_in().headers["Authorization"].removeprefix("Bearer ")
        writers = [Writer(server, token, f"w{index}", tmp_path, stop) for index in range(clients)]
        reader = Reader(server, token, stop)
        started = processes(server)
        for thread in (*writers, reader):
            thread.start()
        recovered = []
        for number in range(restarts):
            time.sleep(1)
            recovered.append(restart(own_postgres, writers, kill=number % 2 == 1))
        time.sleep(0.5)
        until_written(writers, 20 * restarts)
        stop.set()
        for thread in (*writers, reader):
            thread.join(60)
        assert processes(server) == started
        figures: dict[str, Any] = {**judge(server, writers)}
    refused = sum(writer.refused for writer in writers)
    answers = {f"{name} {status}": count for (name, status, _), count in sorted(reader.answers.items())}
    figures |= {"restarts": restarts, "clients": clients, "refused": refused, "recovered_s": round(max(recovered), 2)}
    figure("R5", figures | answers)
    assert [fault for writer in writers for fault in writer.unexpected] == []
    assert (sum(writer.disconnected for writer in writers), reader.errors) == (0, [])
    assert {*reader.answers} <= {("health", 200, False), ("tasks", 200, False), ("tasks", 503, True)}
    assert reader.answers["tasks", 503, True] + refused > restarts
    assert figures["acknowledged"] > 20 * restarts
