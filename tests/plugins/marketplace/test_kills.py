"""A server is killed by SIGKILL in the middle of installations: each one is there completely, or not at all.

Short form: 4 kills; long form (`--long`): 20 kills.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from corral.testing.server import ServerProcess

KINDS = {"agent": 2, "workflow": 1, "trigger": 1}
"""What an installation of `incident-triage` creates."""


def _installing(server: ServerProcess, headers: Any, done: threading.Event) -> None:
    with (
        contextlib.suppress(httpx2.HTTPError),
        httpx2.Client(base_url=f"{server.address}/api/v1", headers=headers, trust_env=False, timeout=60) as client,
    ):
        while True:
            if client.post("/marketplace/templates/incident-triage/install", json={}).status_code == 201:
                done.set()


def test_marketplace_2_a_kill_leaves_each_installation_whole_or_absent(
    database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = 20 if request.config.getoption("--long", default=False) else 4
    random.seed(kills)
    arguments = ("--no-embedded-worker",)
    server = ServerProcess(tmp_path, database_url=database_url, arguments=arguments)
    with server:
        admin = server.sign_in()
        key = admin.post("/security/api-keys", json={"name": "test", "scopes": ["*"]}).raise_for_status().json()["key"]
        headers = {"Authorization": f"Bearer {key}"}
        for _ in range(kills):
            done = threading.Event()
            threads = [threading.Thread(target=_installing, args=(server, headers, done)) for _ in range(3)]
            for thread in threads:
                thread.start()
            assert done.wait(120)
            time.sleep(random.uniform(0, 0.2))
            server.kill()
            for thread in threads:
                thread.join()
            server.start()
        client = server.client(key)
        total = client.get("/marketplace/installations").raise_for_status().json()["total"]
        assert total > 0
        for kind, each in KINDS.items():
            found = client.get(f"/{kind}s").raise_for_status().json()
            assert found["total"] == total * each, kind
        installed: Counter[str] = Counter()
        for row in client.get("/marketplace/installations?limit=200").json()["items"]:
            shown = client.get(f"/marketplace/installations/{row['id']}").json()["created"]
            installed.update(one["kind"] for one in shown if one["state"] == "present" and not one["edited"])
            assert len(shown) == sum(KINDS.values())
        assert installed == {kind: each * min(total, 200) for kind, each in KINDS.items()}
