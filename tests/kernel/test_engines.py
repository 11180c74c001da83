"""Engines of the testing kit: real servers that start, die, come back and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import valkey

from corral.testing import database_server_base
from corral.testing.database_server_base import DatabaseServerError, database_servers_folder, reap
from corral.testing.database_servers import PostgresServer, ValkeyServer

OWNER = """
import sys, time
from corral.testing import database_servers
server = getattr(database_servers, sys.argv[1])().start()
print(server.folder, server.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.mark.postgres
def test_databases_are_made_copied_and_dropped(postgres: PostgresServer) -> None:
    template = postgres.create_database()
    with psycopg.connect(template) as connection:
        connection.execute("CREATE TABLE herd (name text)")
        connection.execute("INSERT INTO herd VALUES ('ada')")
    copy = postgres.create_database(template=template)
    assert copy != template
    with psycopg.connect(copy) as connection:
        assert connection.execute("SELECT name FROM herd").fetchall() == [("ada",)]
    busy = psycopg.connect(copy)
    postgres.drop_database(copy)
    with pytest.raises(psycopg.OperationalError):
        busy.execute("SELECT 1")
    busy.close()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(copy)
    postgres.drop_database(template)


@pytest.mark.postgres
def test_url_names_user_database_and_socket_folder(postgres: PostgresServer) -> None:
    assert postgres.url("x") == f"postgresql://postgres@/x?host={postgres.folder}"
    assert len(f"{postgres.folder}/.s.PGSQL.5432") < 104


@pytest.mark.postgres
def test_postgres_never_runs_as_root(postgres: PostgresServer) -> None:
    assert psutil.Process(postgres.pid).uids().real != 0


@pytest.mark.postgres
def test_postgres_killed_and_restarted_keeps_what_was_committed() -> None:
    with PostgresServer() as server:
        url = server.create_database()
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE herd AS SELECT 7 AS heads")
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url)
        server.restart()
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT heads FROM herd").fetchone() == (7,)
        before = server.pid
        assert server.restart().pid != before


@pytest.mark.postgres
def test_a_server_that_cannot_start_raises_with_its_log() -> None:
    left = set(database_servers_folder().iterdir())
    with pytest.raises(DatabaseServerError, match="no_such_setting"):
        PostgresServer(settings={"no_such_setting": "1"}).start()
    assert {path for path in database_servers_folder().iterdir() if path.name.startswith("postgres-")} <= left


@pytest.mark.redis
def test_valkey_answers_on_its_socket_alone() -> None:
    with ValkeyServer() as server, valkey.Valkey.from_url(server.url()) as client:
        assert client.ping()
        assert client.config_get("port") == {"port": "0"}
        folder = server.folder
    assert not folder.exists()


@pytest.mark.redis
@pytest.mark.parametrize(("persist", "kept"), [(True, b"ada"), (False, None)])
def test_valkey_killed_and_restarted_keeps_what_it_promised(persist: bool, kept: bytes | None) -> None:
    with ValkeyServer(persist=persist) as server:
        with valkey.Valkey.from_url(server.url()) as client:
            client.set("name", "ada")
        server.kill()
        server.restart()
        with valkey.Valkey.from_url(server.url()) as client:
            assert client.get("name") == kept


def test_nothing_is_known_of_a_server_before_it_starts() -> None:
    server = ValkeyServer()
    with pytest.raises(DatabaseServerError):
        _ = server.folder
    with pytest.raises(DatabaseServerError):
        _ = server.pid
    server.stop()


@pytest.mark.redis
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_does_not_stop_its_parents_server() -> None:
    with ValkeyServer() as server:
        child = os.fork()
        if child == 0:
            server.stop()
            os._exit(0)
        os.waitpid(child, 0)
        with valkey.Valkey.from_url(server.url()) as client:
            assert client.ping()


@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.parametrize("kind", ["PostgresServer", "ValkeyServer"])
def test_servers_of_a_killed_run_are_reaped_and_those_of_a_living_one_are_not(kind: str) -> None:
    kernel = Path(__file__).parents[2] / "kernel"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, kind],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(kernel)},
    )
    assert owner.stdout is not None
    folder, pid = owner.stdout.readline().split()
    reap()
    assert psutil.pid_exists(int(pid))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert psutil.pid_exists(int(pid)), "the server outlives its owner"
    # Another run beside this one may be the reaper, so what counts is that the server goes.
    reap()
    deadline = time.monotonic() + 60
    while (Path(folder).exists() or _lives(int(pid))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(folder).exists()
    assert not _lives(int(pid))


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_servers_that_need_not_last_live_in_memory_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr(database_server_base, "_MEMORY", tmp_path)
    monkeypatch.setattr(database_server_base, "_is_open_to_all", lambda folder: True)
    monkeypatch.setattr(database_server_base, "_SOCKET_LIMIT", 200)
    monkeypatch.setattr(database_server_base, "_ROOM", 1)
    assert database_servers_folder(in_memory=True).parent == tmp_path
    assert database_servers_folder().parent != tmp_path
    monkeypatch.setattr(database_server_base, "_ROOM", 2**62)
    assert database_servers_folder(in_memory=True) == database_servers_folder()
