"""S12: after signing out, a revocation, a new password or a deactivation, access token, refresh token, API key and open
sockets are dead in every process within 2 s.

Two processes. From the moment of the answer, new connections ask again and again with the dead credential: the last
success counts. Short form: one round of each; long form (`--long`): 25.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest
from tests.limits import Stopwatch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from corral.testing.server import PASSWORD, ServerProcess

pytestmark = pytest.mark.one_engine

LIMIT_SECONDS, WATCHED_SECONDS = 2.0, 3.0
SOCKETS = 4  # enough to reach both processes
PAUSE = 0.04  # seconds between two requests with a dead credential


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[ServerProcess]:
    arguments = ("--processes", "2", "--no-embedded-worker")
    environ = {"CORRAL_REGISTRATION": "open"}
    with ServerProcess(tmp_path, database_url=database_url, arguments=arguments, environ=environ) as server:
        yield server


class Person:
    """Somebody with a session, an API key, and sockets to all processes."""

    def __init__(self, server: ServerProcess, number: int) -> None:
        self.server, self.email = server, f"person{number}@example.org"
        with server.client() as client:
            body = {"email": self.email, "password": PASSWORD, "full_name": "Somebody"}
            client.post("/auth/register", json=body).raise_for_status()
            answer = client.post("/auth/login", json={"email": self.email, "password": PASSWORD}).raise_for_status()
        self.access, self.refresh = answer.json()["access_token"], answer.json()["refresh_token"]
        self.id = answer.json()["user"]["id"]
        with self.client() as client:
            self.session_id = client.get("/auth/me").raise_for_status().json()["session"]["id"]
            made = client.post("/security/api-keys", json={"name": "script"})
            self.key = str(made.raise_for_status().json()["key"])
        address = f"{server.address.replace('http', 'ws', 1)}/ws"
        headers = {"Authorization": f"Bearer {self.access}"}
        self._open = contextlib.ExitStack()
        self.sockets = [
            self._open.enter_context(connect(address, additional_headers=headers, proxy=None)) for _ in range(SOCKETS)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def client(self) -> httpx2.Client:
        return self.server.client(self.access)

    def again(self) -> httpx2.Client:
        """Another session of the same person."""
        return self.server.sign_in(self.email)


def logout(person: Person, admin: httpx2.Client) -> None:
    with person.client() as client:
        client.post("/auth/logout").raise_for_status()


def end_by_owner(person: Person, admin: httpx2.Client) -> None:
    with person.again() as client:
        client.delete(f"/auth/sessions/{person.session_id}").raise_for_status()


def new_password(person: Person, admin: httpx2.Client) -> None:
    with person.again() as client:
        body = {"current_password": PASSWORD, "new_password": "an entirely other phrase"}
        client.post("/auth/change-password", json=body).raise_for_status()


def revoke_by_admin(person: Person, admin: httpx2.Client) -> None:
    path = f"/security/users/{person.id}/revoke-sessions"
    admin.post(path, json={"include_api_keys": True}).raise_for_status()


def deactivate(person: Person, admin: httpx2.Client) -> None:
    admin.patch(f"/admin/users/{person.id}", json={"is_active": False}).raise_for_status()


ENDS: dict[str, tuple[Callable[[Person, httpx2.Client], None], bool]] = {
    "logout": (logout, False),
    "end_by_owner": (end_by_owner, False),
    "new_password": (new_password, True),
    "revoke_by_admin": (revoke_by_admin, True),
    "deactivate": (deactivate, True),
}
"""How a session ends, and whether API keys end with it."""


class Watch(threading.Thread):
    """Asks with a credential over new connections until `WATCHED_SECONDS` after `began`; `last`: its last success."""

    def __init__(self, server: ServerProcess, headers: dict[str, str], stop: threading.Event, clock: Stopwatch) -> None:
        super().__init__(daemon=True)
        self.server, self.headers, self.stop, self.clock = server, headers, stop, clock
        self.asked, self.last = 0, 0.0

    def run(self) -> None:
        address, anew = f"{self.server.address}/api/v1/auth/me", httpx2.Limits(max_keepalive_connections=0)
        with httpx2.Client(timeout=30, trust_env=False, headers=self.headers, limits=anew) as client:
            while not self.stop.wait(PAUSE):
                with contextlib.suppress(httpx2.HTTPError):
                    asked = self.clock.seconds
                    if client.get(address).status_code == 200:
                        self.last = asked
                    self.asked += 1


class Listener(threading.Thread):
    """Waits for the end of a socket."""

    def __init__(self, socket: ClientConnection, clock: Stopwatch) -> None:
        super().__init__(daemon=True)
        self.socket, self.clock, self.ended, self.code = socket, clock, 0.0, 0

    def run(self) -> None:
        try:
            while True:
                self.socket.recv()
        except ConnectionClosed:
            self.ended, self.code = self.clock.seconds, self.socket.close_code or 0


def measure(
    person: Person, end: Callable[[Person, httpx2.Client], None], keys: bool, admin: httpx2.Client, clock: Stopwatch
) -> float:
    """Seconds from the answer until everything was dead."""
    stop = threading.Event()
    watches = [Watch(person.server, {"Authorization": f"Bearer {person.access}"}, stop, clock) for _ in range(2)]
    if keys:
        watches.append(Watch(person.server, {"X-API-Key": person.key}, stop, clock))
    listeners = [Listener(socket, clock) for socket in person.sockets]
    for thread in (*watches, *listeners):
        thread.start()
    patience = time.monotonic() + 60
    while not all(watch.last for watch in watches):
        assert time.monotonic() < patience
        time.sleep(0.05)
    end(person, admin)
    ended, before = clock.seconds, [watch.asked for watch in watches]
    with person.server.client() as client:  # at once, since it is the rows that are asked
        assert client.post("/auth/refresh", json={"refresh_token": person.refresh}).status_code == 401
    while clock.seconds < ended + WATCHED_SECONDS or any(
        watch.asked < known + 10 for watch, known in zip(watches, before, strict=True)
    ):
        time.sleep(PAUSE)
    stop.set()
    for thread in (*watches, *listeners):
        thread.join(60)
    assert [listener.code for listener in listeners] == [4401] * SOCKETS
    return max(*(watch.last - ended for watch in watches), *(listener.ended - ended for listener in listeners))


def test_s12_what_is_ended_is_dead_everywhere(server: ServerProcess, long_form: bool, figure: Any) -> None:
    number, took = itertools.count(), []
    slowest: dict[str, float] = {}
    with server.sign_in() as admin, Stopwatch() as clock:
        for _ in range(25 if long_form else 1):
            for name, (end, keys) in ENDS.items():
                with Person(server, next(number)) as person:
                    seconds = measure(person, end, keys, admin, clock)
                slowest[name] = round(max(seconds, slowest.get(name, 0.0)), 2)
                took.append(seconds)
    took.sort()
    p99 = took[max(0, -(-len(took) * 99 // 100) - 1)]
    figure("S12", {"ends": len(took), "p50_s": round(took[len(took) // 2], 2), "p99_s": round(p99, 2), **slowest})
    assert p99 <= LIMIT_SECONDS
