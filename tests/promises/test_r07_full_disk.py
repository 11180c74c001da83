"""R7: the disk of the database is full while clients write, then has space again: writes get 503 `storage_full`, reads
are answered, nothing that was acknowledged is lost, the file is intact, and the server goes on with the same processes.

Short form: once, with 4 clients; long form (`--long`): 10 times with 20 clients.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import psycopg
import pytest
from tests.limits import Stopwatch
from tests.promises.small_disk import SmallDisk
from tests.promises.test_r01_kill_the_server import RECOVERY_SECONDS, Writer, judge, until_written

from corral.testing.database_servers import PostgresServer
from corral.testing.server import ServerProcess

READS = ("/tasks", "/agents", "/events", "/tasks/stats")


def processes(server: ServerProcess) -> list[psutil.Process]:
    """The server's processes, in the order of their ids."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    return sorted([root, *root.children(recursive=True)], key=lambda each: each.pid)


def while_full(admin: httpx2.Client, writers: list[Writer]) -> Counter[str]:
    """Write until no write fits any more, then read everything and write some more; how often each answer came."""
    answers: Counter[str] = Counter()
    until = time.monotonic() + 120
    before = [writer.refused for writer in writers]
    while any(writer.refused < known + 3 for writer, known in zip(writers, before, strict=True)):
        assert time.monotonic() < until, "a full disk takes every write"
        time.sleep(0.05)
    for number in range(20):
        refused = admin.post(
            "/tasks", json={"title": f"finds no space {number}", "instructions": secrets.token_hex(20_000)}
        )
        answers[f"write {refused.status_code} {refused.json().get('code')}"] += 1
        assert int(refused.headers.get("retry-after", 0)) > 0, refused.text
        for path in READS:
            answers[f"read {admin.get(path).status_code}"] += 1
    return answers


def database_on(disk: SmallDisk, server: PostgresServer) -> str:
    """Create a database whose tables are on this disk, and return its URL. The log of PostgreSQL is elsewhere."""
    space, owner = disk.path / "space", (server.folder / "data").stat()
    space.mkdir()
    os.chown(space, owner.st_uid, owner.st_gid)
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(f"CREATE TABLESPACE small LOCATION '{space}'".encode())
        admin.execute("CREATE DATABASE corral TABLESPACE small")
    return server.url("corral")


@pytest.fixture
def small(database_url: str, tmp_path: Path) -> Iterator[tuple[SmallDisk, str]]:
    """A small disk, and the URL of a database on it."""
    if database_url.startswith("sqlite"):
        with SmallDisk(tmp_path / "disk") as disk:
            yield disk, f"sqlite:///{disk.path}/corral.db"
        return
    with PostgresServer() as server, SmallDisk(server.folder / "disk") as disk:
        if not disk.is_mounted:
            pytest.skip("a full disk for PostgreSQL takes the right to mount a file system")
        yield disk, database_on(disk, server)


def test_r07_a_full_disk_refuses_writes_and_nothing_else(
    small: tuple[SmallDisk, str], tmp_path: Path, long_form: bool, figure: Any
) -> None:
    rounds, clients = (10, 20) if long_form else (1, 4)
    stop, answers, recovered = threading.Event(), Counter[str](), []
    disk, url = small
    environ = {"CORRAL_DATA_DIR": str(disk.path / "data"), "CORRAL_ACCESS_TTL": "3600"}
    with ServerProcess(tmp_path, database_url=url, environ=environ) as server:
        admin = server.sign_in()
        token = admin.headers["Authorization"].removeprefix("Bearer ")
        writers = [Writer(server, token, f"w{index}", tmp_path, stop) for index in range(clients)]
        started = processes(server)
        for writer in writers:
            writer.start()
        for _ in range(rounds):
            time.sleep(1)
            disk.fill(started)
            answers += while_full(admin, writers)
            disk.free(started)
            freed = time.monotonic()
            with Stopwatch() as watch:
                while not all(writer.wrote > freed for writer in writers):
                    assert watch.seconds < RECOVERY_SECONDS, "clients cannot write again"
                    time.sleep(0.02)
            recovered.append(watch.seconds)
        until_written(writers, 20 * rounds)
        stop.set()
        for writer in writers:
            writer.join(60)
        assert processes(server) == started
        figures: dict[str, Any] = {**judge(server, writers)}
        if url.startswith("sqlite"):
            with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert server.stop() == 0
    kind = "ENOSPC" if disk.is_mounted else "RLIMIT_FSIZE"
    figures |= {"rounds": rounds, "full_by": kind, **answers, "recovered_s": round(max(recovered), 2)}
    figure("R7", figures)
    assert {*answers} == {"write 503 storage_full", "read 200"}
    assert [fault for writer in writers for fault in writer.unexpected] == []
    assert sum(writer.disconnected for writer in writers) == 0
    assert figures["acknowledged"] > 20 * rounds
