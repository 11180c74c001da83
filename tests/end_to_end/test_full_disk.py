"""A start on a full disk: the server starts, reads, says so, and writes again when there is room."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from corral.testing.server import ServerProcess

pytestmark = [pytest.mark.sqlite, pytest.mark.one_engine]
SIZE = "24m"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount the small file system of this test")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Fill the file system to its last page."""
    with contextlib.suppress(OSError), (disk / "fill").open("ab", buffering=0) as file:
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\xff" * size)
    found = os.statvfs(disk)
    assert found.f_bavail == 0


def post_until(client: httpx2.Client, status: int, *, seconds: float) -> httpx2.Response:
    """Create tasks until the answer has this status."""
    until = time.monotonic() + seconds
    while True:
        answer = client.post("/tasks", json={"title": "x", "description": "y" * 16_000})
        if answer.status_code == status or time.monotonic() > until:
            assert answer.status_code == status, answer.text
            return answer


def test_reliability_a_start_on_a_full_disk_reads_and_says_so(disk: Path, tmp_path: Path) -> None:
    server = ServerProcess(
        tmp_path, environ={"CORRAL_DATA_DIR": str(disk / "data")}, arguments=("--no-embedded-worker",)
    )
    with server:
        admin = server.sign_in()
        task_id = admin.post("/tasks", json={"title": "before"}).raise_for_status().json()["id"]
        server.stop()
        for _ in range(3):  # each start keeps what it did not need for the next one
            fill(disk)
            server.start()
            server.wait_for_log("the disk is full")
            assert admin.get(f"/tasks/{task_id}").json()["title"] == "before"
            refused = post_until(admin, 503, seconds=60)
            assert (refused.json()["code"], bool(refused.headers["retry-after"])) == ("storage_full", True)
            assert admin.get("/tasks").status_code == 200
            health = admin.get("/settings/health").json()
            assert health["checks"]["disk"]["status"] == "down", health
            server.stop()
        fill(disk)
        server.start()
        (disk / "fill").unlink()
        post_until(admin, 201, seconds=60)
        server.stop()
        server.start()
        server.kill()
        fill(disk)
        server.start()  # a killed server leaves the reserve too
        assert admin.get(f"/tasks/{task_id}").status_code == 200
