"""Two servers on one database: exactly one decision counts, and comments and revisions of both are kept."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.plugins.code_reviews.conftest import patch_of

from corral.testing.server import ServerProcess

DECISIONS = 20
PATIENCE = 120


class Servers:
    """The clients of two processes on one database, signed in as one admin."""

    def __init__(self, clients: list[httpx2.Client]) -> None:
        self.clients = clients
        self.agent_id = self.ok(0, "/agents", {"name": "author"})["id"]

    def ok(self, n: int, path: str, body: Any) -> Any:
        """A POST request to a server that must succeed."""
        return self.clients[n % 2].post(path, json=body).raise_for_status().json()

    def opened(self) -> Any:
        """A review that the first server opened."""
        return self.ok(0, "/code-reviews", {"title": "A change", "agent_id": self.agent_id, "patch": patch_of("TWO")})

    def act(self, n: int, review_id: str, action: str, body: Any = None) -> httpx2.Response:
        """A POST request about a review to a server."""
        return self.clients[n % 2].post(f"/code-reviews/{review_id}/{action}", json=body or {})


@pytest.fixture
def servers(database_url: str, tmp_path: Path) -> Iterator[Servers]:
    """Two processes on one database."""
    environ = {"CORRAL_DATA_DIR": str(tmp_path / "data")}
    clients = []
    with contextlib.ExitStack() as stack:
        for name in ("a", "b"):  # one after the other: the first migrates
            (tmp_path / name).mkdir()
            server = ServerProcess(tmp_path / name, database_url=database_url, environ=environ)
            stack.callback(server.kill)
            client = stack.enter_context(server.start(seconds=PATIENCE).sign_in())
            client.timeout = PATIENCE
            clients.append(client)
        yield Servers(clients)


def test_code_reviews_2_3_and_4_hold_in_two_processes(servers: Servers) -> None:
    _check_parallel_decisions(servers)
    _check_an_old_hash(servers)
    _check_comments_and_revisions(servers)


def _check_parallel_decisions(servers: Servers) -> None:
    review_id = servers.opened()["id"]
    actions = ("approve", "reject", "request-changes")
    with ThreadPoolExecutor(DECISIONS) as pool:
        answers = list(pool.map(lambda n: servers.act(n, review_id, actions[n // 2 % 3]), range(DECISIONS)))
    won = [answer.json() for answer in answers if answer.status_code == 200]
    lost = [answer.json() for answer in answers if answer.status_code == 409]
    assert (len(won), len(lost)) == (1, DECISIONS - 1), [answer.text for answer in answers]
    status = won[0]["status"]
    assert {(each["code"], each["current_status"]) for each in lost} == {("already_decided", status)}
    for client in servers.clients:
        seen = client.get(f"/code-reviews/{review_id}").json()
        assert (seen["status"], seen["version"]) == (status, won[0]["version"])


def _check_an_old_hash(servers: Servers) -> None:
    """The second server refuses the hash of what the first has just replaced."""
    old = servers.opened()
    revised = servers.act(0, old["id"], "revisions", {"patch": patch_of("2")}).raise_for_status().json()
    stale = servers.act(1, old["id"], "approve", {"patch_sha256": old["patch_sha256"]})
    assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")
    diff = servers.clients[1].get(f"/code-reviews/{old['id']}/diff").content
    assert hashlib.sha256(diff).hexdigest() == revised["patch_sha256"]
    approved = servers.act(1, old["id"], "approve", {"patch_sha256": revised["patch_sha256"]})
    assert approved.json()["status"] == "approved", approved.text


def _check_comments_and_revisions(servers: Servers) -> None:
    """Comments that arrive while revisions do are about lines of the revision that they name."""
    review_id = servers.opened()["id"]

    def act(n: int) -> int:
        if n % 4 == 0:
            patch = patch_of(*(f"{line}" for line in range(1 + n // 4)))
            return servers.act(n // 4, review_id, "revisions", {"patch": patch}).status_code
        comment = {"body": f"comment {n}", "file": "x.py", "line": 1}
        return servers.act(n, review_id, "comment", comment).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(act, range(24)))
    assert set(statuses) <= {200, 201, 503}, statuses  # 503: a new revision came before each of three tries
    seen = servers.clients[1].get(f"/code-reviews/{review_id}").json()
    made = sorted(f"comment {n}" for n, status in enumerate(statuses) if status == 201)
    assert sorted(each["body"] for each in seen["comments"]) == made
    assert seen["revision"] == 1 + statuses.count(200)
    for comment in seen["comments"]:
        assert comment["anchor"] in ("active", "outdated")
        assert comment["anchor"] == "outdated" or comment["revision"] == seen["revision"]
