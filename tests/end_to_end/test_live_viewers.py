"""Viewers across outages: each gets every event of the log, or is told of the gap.

PostgreSQL, or Redis beside it, is killed and restarted while clients write. A viewer that is disconnected comes back
with its cursor, as any client would. Short form: two outages; long form (`--long`): ten.
"""

from __future__ import annotations

import abc
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from corral.testing.database_servers import PostgresServer, ValkeyServer
from corral.testing.server import ServerProcess

pytestmark = [pytest.mark.postgres, pytest.mark.redis]
TYPES = "task.created"
AWAY_SECONDS = 1.5


class Viewer(threading.Thread, abc.ABC):
    """A client that follows live: what it got, in order, and the gaps that it was told of."""

    def __init__(self, server: ServerProcess, token: str, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.token, self.over = server, token, over
        self.got: list[int] = []
        self.gaps: list[tuple[int, int]] = []
        self.connections = 0
        self.connected = threading.Event()

    @property
    def cursor(self) -> int:
        """The last event that the viewer knows of."""
        return max([0, *self.got[-1:], *(to for _, to in self.gaps[-1:])])

    def run(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError, httpx2.HTTPError, WebSocketException, TimeoutError):
                self.follow()
            time.sleep(0.1)

    @abc.abstractmethod
    def follow(self) -> None:
        """Connect, and take frames until the connection ends."""

    def take(self, frame: dict[str, Any]) -> None:
        """Note a frame."""
        if frame["type"] == "event":
            self.got.append(frame["seq"])
        elif frame["type"] == "gap":
            self.gaps.append((frame["from"] or 0, frame["to"]))

    def knows(self, seq: int) -> bool:
        """Return whether the viewer got the event or was told that it is missing."""
        return seq in self.got or any(start <= seq <= to for start, to in self.gaps)


class SocketViewer(Viewer):
    """A viewer on `/ws`."""

    def follow(self) -> None:
        address = f"{self.server.address.replace('http', 'ws')}/ws"
        headers = {"Authorization": f"Bearer {self.token}"}
        with connect(address, additional_headers=headers, proxy=None, open_timeout=20) as socket:
            self.connections += 1
            socket.send(json.dumps({"type": "subscribe", "event": TYPES, "since": self.cursor}))
            while not self.over.is_set():
                with contextlib.suppress(TimeoutError):
                    frame = json.loads(socket.recv(timeout=0.5))
                    self.take(frame)
                    if frame["type"] == "subscribed":
                        self.connected.set()


class StreamViewer(Viewer):
    """A viewer of the event stream."""

    def follow(self) -> None:
        headers = {"Last-Event-ID": str(self.cursor)}
        with (
            self.server.client(self.token) as client,
            client.stream("GET", "/events/stream", params={"types": TYPES}, headers=headers) as answer,
        ):
            answer.raise_for_status()
            self.connections += 1
            for line in answer.iter_lines():
                self.connected.set()
                if line.startswith("data: "):
                    self.take(json.loads(line.removeprefix("data: ")))
                if self.over.is_set():
                    return


class Writer(threading.Thread):
    """Creates tasks, about 40 a second."""

    def __init__(self, server: ServerProcess, token: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.token, self.stop, self.created = server, token, stop, 0

    def run(self) -> None:
        with self.server.client(self.token) as client:
            while not self.stop.wait(0.025):
                with contextlib.suppress(httpx2.HTTPError):
                    self.created += client.post("/tasks", json={"title": "x"}).status_code == 201


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[PostgresServer, ValkeyServer]]:
    """Servers that this module may kill."""
    with PostgresServer() as postgres, ValkeyServer() as valkey:
        yield postgres, valkey


@pytest.fixture
def fleet(engines: tuple[PostgresServer, ValkeyServer], tmp_path: Path) -> Iterator[list[ServerProcess]]:
    """Two servers on one database, with Redis between them."""
    postgres, valkey = engines
    url = postgres.create_database()
    environ = {
        "CORRAL_REDIS_URL": valkey.url(),
        "CORRAL_DATA_DIR": str(tmp_path / "data"),
        "CORRAL_ACCESS_TTL": "3600",
    }
    servers = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        servers.append(
            ServerProcess(
                tmp_path / name, database_url=url, environ=environ, arguments=("--no-jobs", "--no-embedded-worker")
            )
        )
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        yield servers


def shut_down(engine: PostgresServer | ValkeyServer) -> None:
    """Stop the server as its administrator would: it ends the connections, and writes what it has."""
    process = psutil.Process(engine.pid)
    process.send_signal(signal.SIGINT)
    psutil.wait_procs([process], timeout=20)
    engine.kill()  # what is left of it


def until(condition: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.05)


@pytest.mark.parametrize("which", ["postgres", "redis"])
def test_realtime_every_viewer_gets_every_event_across_outages(
    fleet: list[ServerProcess], engines: tuple[PostgresServer, ValkeyServer], which: str, long_form: bool
) -> None:
    engine = engines[("postgres", "redis").index(which)]
    stop, over = threading.Event(), threading.Event()
    with fleet[0].sign_in() as admin:
        token = admin.headers["Authorization"].removeprefix("Bearer ")
        viewers: list[Viewer] = [kind(server, token, over) for server in fleet for kind in (SocketViewer, StreamViewer)]
        writers = [Writer(server, token, stop) for server in fleet]
        for viewer in viewers:
            viewer.start()
        for viewer in viewers:
            assert viewer.connected.wait(60)
        for writer in writers:
            writer.start()
        for number in range(10 if long_form else 2):
            time.sleep(1.0)
            shut_down(engine) if number % 2 else engine.kill()
            time.sleep(AWAY_SECONDS)
            engine.restart()
            time.sleep(3.0)
        until(lambda: sum(writer.created for writer in writers) > 50, 60)
        stop.set()
        for writer in writers:
            writer.join(60)
        logged = log_of(admin)
        created = sum(writer.created for writer in writers)
        assert len(logged) >= created
        until(lambda: all(viewer.knows(logged[-1]) for viewer in viewers), 60)
        logged = log_of(admin)
        over.set()
        for viewer in viewers:
            missed = [seq for seq in logged if not viewer.knows(seq)]
            assert missed == [], (type(viewer).__name__, viewer.connections, viewer.gaps)
            assert viewer.got == sorted(set(viewer.got)), "an event came twice or out of order"


def log_of(admin: httpx2.Client) -> list[int]:
    """The numbers of all events of the log that the viewers follow."""
    found: list[int] = []
    while True:
        params: dict[str, str | int] = {"types": TYPES, "limit": 200, "after": found[-1] if found else 0}
        page = admin.get("/events", params=params).raise_for_status().json()["items"]
        if not page:
            return found
        found += [event["seq"] for event in page]
