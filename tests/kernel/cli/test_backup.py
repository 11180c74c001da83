"""`corral backup` writes everything to one file, and `corral restore` puts it into an empty database of either engine.

Done when, of the page on operations: 5.
"""

from __future__ import annotations

import contextlib
import json
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.cli.conftest import Command

from corral.database.connect import connect
from corral.database.dialect import execute
from corral.testing.database_servers import PostgresServer
from corral.testing.server import ServerProcess
from corral_core.backup.command import TableProgress

ENGINES = [
    pytest.param("sqlite", marks=pytest.mark.sqlite),
    pytest.param("postgres", marks=pytest.mark.postgres),
]


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A function that makes an empty database of an engine and returns its URL."""
    made: list[str] = []

    def make(engine: str, name: str) -> str:
        if engine == "sqlite":
            (tmp_path / name).mkdir(exist_ok=True, mode=0o700)
            return f"sqlite:///{tmp_path}/{name}/corral.db"
        server: PostgresServer = request.getfixturevalue("postgres_server")
        made.append(server.unused_database_url())
        server.create_database(url=made[-1])
        return made[-1]

    yield make
    for url in made:
        request.getfixturevalue("postgres_server").drop_database(url)


# The restore itself adds rows to these: its alert, its audit row, the kill switch and the search index.
GROWN = frozenset({"kernel_events", "audit_rows", "admin_kill_switch", "kernel_leases", "tasks_documents"})


@contextlib.contextmanager
def admin_writes(admin: Any) -> Iterator[list[int]]:
    """Create tasks all the time, and yield the list of their statuses."""
    statuses: list[int] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            made = admin.post("/tasks", json={"title": "a task", "description": "d"})
            statuses.append(made.status_code)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join()
    assert {*statuses} == {201}


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    database = connect(url, pool_size=1)
    try:
        return [tuple(row) for row in database.run(lambda: execute(sql, []).fetchall(), read=True)]
    finally:
        database.close()


def place(corral: Command, name: str, url: str) -> dict[str, str]:
    return {"CORRAL_DATA_DIR": str(corral.home / name), "CORRAL_DATABASE_URL": url}


@pytest.mark.parametrize("target", ENGINES)
def test_operations_5_a_backup_under_load_restores_into_either_engine(
    corral: Command, new_url: Any, target: str
) -> None:
    """Rows are written while the backup is made; what it restored runs nothing until it is released.

    A backup of the restored installation goes back into SQLite.
    """
    old, new = new_url("sqlite", "old"), new_url(target, "new")
    file = corral.home / "all.backup"
    (corral.home / "old").mkdir(exist_ok=True, mode=0o700)
    server = ServerProcess(corral.home / "old", database_url=old)
    server.environ["CORRAL_DATA_DIR"] = str(corral.home / "old")
    with server, server.sign_in() as admin:
        admin.post("/secrets", json={"name": "token", "value": "not in the backup"}).raise_for_status()
        (corral.home / "old" / "files").mkdir(exist_ok=True, mode=0o700)
        (corral.home / "old" / "files" / "a-file").write_bytes(b"contents")
        first = admin.post("/tasks", json={"title": "a task", "description": "d"})
        assert first.status_code == 201  # the backup contains a task, however late the others are
        with admin_writes(admin) as written:
            done = corral("backup", str(file), "--json", environ=place(corral, "old", old))
        assert done.status == 0, done
        assert written, "nothing was written meanwhile"
        assert (done.json()["files"], done.json()["file"]) == (1, str(file))
        token = admin.headers["Authorization"]
        metrics = admin.get(f"{server.address}/metrics").text
        assert "corral_last_backup_age_seconds " in metrics
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"not in the backup" not in everything
    assert (corral.home / "old" / "master.key").read_bytes().strip() not in everything
    assert manifest["schemas"]["tasks"][0] == "0001_initial"

    done = corral("restore", str(file), "--json", environ=place(corral, "new", new))
    assert (done.status, done.json()["defects"]) == (0, []), done
    assert (corral.home / "new" / "files" / "a-file").read_bytes() == b"contents"
    for table, entry in manifest["tables"].items():
        if table not in GROWN:
            assert rows(new, f"SELECT COUNT(*) FROM {table}") == [(entry["rows"],)], table
    assert rows(new, "SELECT COUNT(*) FROM accounts_sessions WHERE ended_at IS NULL") == [(0,)]
    assert rows(new, "SELECT COUNT(*) FROM kernel_leases") == [(0,)]
    assert [bool(one) for one in rows(new, "SELECT engaged, hold_deliveries FROM admin_kill_switch")[0]] == [True, True]
    assert rows(new, "SELECT COUNT(*) FROM kernel_events WHERE type = 'system.alert' AND data LIKE '%restored%'") != [
        (0,)
    ]
    verified = corral("audit", "verify", "--json", environ=place(corral, "new", new))
    assert (verified.status, verified.json()["ok"]) == (0, True), verified

    copy = ServerProcess(corral.home / "new", database_url=new)
    copy.environ["CORRAL_DATA_DIR"] = str(corral.home / "new")
    with copy:
        assert "SEALED" in copy.log  # the master key was backed up apart
        with copy.client(token.removeprefix("Bearer ")) as stale:
            assert stale.get("/auth/me").status_code == 503  # its key is sealed; its session has ended anyway
        with copy.sign_in() as admin:
            assert admin.get("/tasks?search=task").json()["total"] > 0  # the search index was built anew
            state = admin.get("/admin/kill-switch").json()
            assert (state["engaged"], state["hold_deliveries"]) == (True, True)
            made = admin.post("/tasks", json={"title": "a new one", "description": "d"})
            assert made.status_code == 201, made.text  # numbers continue after the restored ones
        off = corral("kill-switch", "off", "--json", environ=place(corral, "new", new))
        assert (off.status, off.json()["engaged"]) == (0, False), off

    back = new_url("sqlite", "back")
    again = corral.home / "again.backup"
    assert corral("backup", str(again), environ=place(corral, "new", new)).status == 0
    assert corral("restore", str(again), environ=place(corral, "back", back)).status == 0
    assert rows(back, "SELECT COUNT(*) FROM tasks_tasks") == rows(new, "SELECT COUNT(*) FROM tasks_tasks")
    assert rows(back, "SELECT COUNT(*) FROM kernel_events WHERE seq IS NULL") == [(0,)]
    assert corral("audit", "verify", environ=place(corral, "back", back)).status == 0


@pytest.fixture
def backed_up(corral: Command, new_url: Any) -> Path:
    file = corral.home / "small.backup"
    environ = place(corral, "old", new_url("sqlite", "old"))
    assert corral("migrate", environ=environ).status == 0
    assert corral("backup", str(file), environ=environ).status == 0
    return file


def test_a_restore_refuses_what_it_cannot_restore_and_changes_nothing(
    corral: Command, new_url: Any, backed_up: Path
) -> None:
    """A database that is not empty, a damaged archive, one of a newer release, and a file that is no archive."""
    again = corral("backup", str(backed_up), environ=place(corral, "old", new_url("sqlite", "old")))
    assert (again.status, "exists" in again.err) == (2, True), again
    used = corral("restore", str(backed_up), environ=place(corral, "old", new_url("sqlite", "old")))
    assert (used.status, "not empty" in used.err) == (3, True), used
    damaged, newer, other = (corral.home / name for name in ("damaged", "newer", "other"))
    rewrite(backed_up, damaged, "tables/security_ip_mode.jsonl", lambda data: data.replace(b'"off"', b'"all"'))
    script = b'"accounts": [\n      "0001_initial"'
    rewrite(backed_up, newer, "manifest.json", lambda data: data.replace(script, script + b', "0002_of_tomorrow"'))
    other.write_text("no archive")
    environ = place(corral, "new", new_url("sqlite", "new"))
    for file, status, words in (
        (damaged, 1, "tables/security_ip_mode.jsonl was changed or is damaged"),
        (newer, 4, "0002_of_tomorrow"),
        (other, 1, "is not a Corral backup"),
    ):
        refused = corral("restore", str(file), environ=environ)
        assert (refused.status, words in refused.err) == (status, True), refused
    assert corral("restore", str(backed_up), environ=environ).status == 0  # the failures left the database empty


def rewrite(source: Path, target: Path, member: str, change: Any) -> None:
    """Copy an archive, and change one member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            changed = change(data) if name == member else data
            assert name != member or changed != data
            new.writestr(name, changed)


STEP = '''
from corral.plugin import Plugin, Provide, hookimpl


class Step:
    def after_restore(self, by):
        return f"{by.id} must look at this."


class StepPlugin(Plugin):
    """A plugin with a step."""

    name = "step"
    wants = ("backup",)

    @hookimpl
    def corral_services(self):
        return [Provide(Step, Step)]

    @hookimpl(optionalhook=True)
    def corral_restore_steps(self):
        return [Step]
'''


def test_corral_restore_steps(corral: Command, new_url: Any, backed_up: Path) -> None:
    """The restore calls the step of each plugin, reports the defect that it found, and takes effect."""
    corral.plugins.add("step", STEP)
    corral.configure(f'[plugins]\nenabled = ["step"]\ndir = "{corral.plugins.path}"\n')
    new = new_url("sqlite", "new")
    done = corral("restore", str(backed_up), "--json", environ=place(corral, "new", new))
    assert done.status == 1, done
    assert [text.partition(" ")[2] for text in done.json()["defects"]] == ["must look at this."]
    assert rows(new, "SELECT engaged FROM admin_kill_switch") == [(1,)]


def test_the_rows_of_each_table_are_told_only_on_request(
    corral: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert corral("migrate").status == 0
    user = ("user", "create", "--admin", "ada@example.org", "--password-file", "-")
    assert corral(*user, stdin="correct horse 77 b\n").status == 0
    done = corral("backup", "quiet.backup")
    assert (done.status, done.err, done.out.count("\n")) == (0, "", 1), done
    done = corral("backup", "verbose.backup", "--verbose", "--json")
    assert "accounts_users: 1 rows" in done.err.splitlines()
    assert done.json()["table_rows"]["accounts_users"] == 1
    for options, told in (((), False), (("--verbose",), True)):
        place = {"CORRAL_DATA_DIR": str(corral.home / f"new{told}")}
        done = corral("restore", "quiet.backup", *options, environ=place)
        assert (done.status, "accounts_users: 1 rows" in done.err.splitlines(), bool(done.err)) == (0, told, told), done
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = TableProgress(verbose=False)
    for text in ("one: 1 rows", "two: 2 rows"):
        progress.print(text)
    progress.end()
    assert capsys.readouterr().err == "\r\x1b[Kone: 1 rows\r\x1b[Ktwo: 2 rows\r\x1b[K"
