"""Migrations where several processes start together, and what only asks for them."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.engines import POSTGRES

from corral.config.reader import load as load_config
from corral.database.connect import connect
from corral.database.migrations import PluginMigrations, migrate, pending_migrations, schema_lock
from corral.database.unit import current
from corral.errors import StartupError
from corral.plugins.discovery import discover
from corral.plugins.loading import load
from corral.plugins.migrations import MigrationsPending, apply_migrations
from corral.testing.plugin_folder import PluginFolder

PLUGIN = 'from corral.plugin import Plugin\n\n\nclass SlowPlugin(Plugin):\n    """Slow."""\n\n    name = "slow"\n'
SLOW = """
import pathlib
import time


def up(migrator, db):
    pathlib.Path(__file__).with_name("began").touch()
    db.execute_sql("CREATE TABLE slow_rows (id INTEGER)")
    db.execute_sql("INSERT INTO slow_rows VALUES (1)")
    time.sleep(0.5)
"""
STARTS = 4


class Start(threading.Thread):
    """What a process does at its start; each has a database of its own."""

    def __init__(self, url: str, folder: Path, wait: Callable[[], object], *, migrates: bool) -> None:
        super().__init__()
        self._config = load_config(
            {"CORRAL_DATABASE_URL": url, "CORRAL_PLUGIN_DIR": str(folder)},
            path=Path("/dev/null"),
            overrides={"plugins.enabled": ["slow"], "database.migrate_on_start": migrates, "data_dir": str(folder)},
        )
        self._url, self._wait = url, wait
        self.states: dict[str, str] = {}
        self.refused = ""

    def run(self) -> None:
        database = connect(self._url, pool_size=1)
        plugins = [item for item in load(discover(self._config), self._config) if item.name in ("accounts", "slow")]
        self._wait()
        try:
            apply_migrations(database, plugins, self._config)
        except (MigrationsPending, StartupError) as refused:
            self.refused = str(refused)
        finally:
            database.close()
        self.states = {item.name: item.state for item in plugins}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the `slow` plugin, whose two scripts take their time."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("corral_slow", "corral_slow.plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    made = PluginFolder(tmp_path / "plugins")
    more = SLOW.replace("CREATE TABLE slow_rows (id INTEGER)", "SELECT 1")
    made.add("slow", PLUGIN, {"migrations/0001_initial.py": SLOW, "migrations/0002_more.py": more})
    return made.path


def start(url: str, folder: Path, waits: Sequence[Callable[[], object]], *, migrates: bool = False) -> list[Start]:
    """A process for each of `waits`, which it calls before it begins; all have ended."""
    starts = [Start(url, folder, wait, migrates=migrates) for wait in waits]
    for process in starts:
        process.start()
    for process in starts:
        process.join()
    return starts


def test_processes_that_start_together_on_an_empty_database_fill_it_once(database_url: str, folder: Path) -> None:
    def one_is_at_it() -> None:
        while not list(folder.rglob("began")):
            time.sleep(0.02)

    starts = start(database_url, folder, [int, *[one_is_at_it] * (STARTS - 1)])
    assert [process.refused for process in starts] == [""] * STARTS
    assert [process.states for process in starts] == [{"accounts": "active", "slow": "active"}] * STARTS
    database = connect(database_url, pool_size=1)
    try:
        rows = database.run(
            lambda: current().connection.execute("SELECT count(*) FROM slow_rows").fetchone()[0], read=True
        )
    finally:
        database.close()
    assert rows == 2


def test_of_a_sqlite_file_there_are_three_copies_from_before_its_migrations(tmp_path: Path, folder: Path) -> None:
    """Done when, of the page on operations: a copy first, three kept."""
    file = tmp_path / "kept.db"

    def copies() -> list[Path]:
        return sorted(tmp_path.glob("kept.db.before-*"))

    start(f"sqlite:///{file}", folder, [int], migrates=True)
    assert copies() == []  # there was nothing to lose
    first = next(folder.rglob("0001_initial.py"))
    for n in range(3, 7):
        first.with_name(f"000{n}_more.py").write_text(
            f"def up(migrator, db):\n    db.execute_sql('CREATE TABLE slow_{n} (id INTEGER)')\n"
        )
        process = start(f"sqlite:///{file}", folder, [int], migrates=True)[0]
        assert process.states["slow"] == "active"
    assert len(copies()) == 3
    assert {copy.stat().st_mode & 0o777 for copy in copies()} == {0o600}
    with contextlib.closing(sqlite3.connect(copies()[-1])) as newest:
        tables = {name for (name,) in newest.execute("SELECT name FROM sqlite_master")}
    assert {"slow_rows", "slow_5"} <= tables
    assert "slow_6" not in tables


def test_a_copy_for_which_there_is_no_room_leaves_nothing_and_is_told(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "kept.db"
    start(f"sqlite:///{file}", folder, [int], migrates=True)
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE large (text TEXT)")
        database.execute("INSERT INTO large VALUES (?)", ("x" * 4_000_000,))
        database.commit()
    more = next(folder.rglob("0001_initial.py")).with_name("0003_more.py")
    more.write_text("def up(migrator, db):\n    db.execute_sql('CREATE TABLE slow_3 (id INTEGER)')\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a file that does not fit, as on a full disk
    try:
        process = start(f"sqlite:///{file}", folder, [int], migrates=True)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free up disk space for" in process.refused
    assert "was not changed" in process.refused
    assert list(tmp_path.glob("kept.db.before-*")) == []
    with contextlib.closing(sqlite3.connect(file)) as database:
        assert not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'slow_3'").fetchall()
    assert start(f"sqlite:///{file}", folder, [int], migrates=True)[0].refused == ""
    assert len(list(tmp_path.glob("kept.db.before-*"))) == 1


def test_what_is_pending_later_is_left_to_the_operator(database_url: str, folder: Path) -> None:
    start(database_url, folder, [int])
    script = next(folder.rglob("0002_more.py"))
    script.with_name("0003_later.py").write_text(script.read_text())
    for process in start(database_url, folder, [threading.Barrier(STARTS).wait] * STARTS):
        assert process.refused == "migrations are pending: slow: 0003_later; run `corral migrate`"


@POSTGRES  # SQLite has no schemas
def test_what_is_pending_is_looked_for_in_the_schema_of_the_search_path(database_url: str, folder: Path) -> None:
    database = connect(database_url, pool_size=1)
    try:
        database.run(lambda: current().connection.execute("CREATE SCHEMA own"))
    finally:
        database.close()
    url = f"{database_url}{'&' if '?' in database_url else '?'}options=-c%20search_path%3Down"
    for process in (*start(url, folder, [int]), *start(url, folder, [int])):
        assert (process.refused, process.states) == ("", {"accounts": "active", "slow": "active"})


def test_scripts_are_listed_in_the_order_of_their_numbers(database_url: str, tmp_path: Path) -> None:
    for name in ("10_third", "2_second", "1_first"):
        (tmp_path / f"{name}.py").write_text("def up(migrator, db):\n    pass\n")
    (tmp_path / "notes.py").touch()
    database = connect(database_url, pool_size=1)
    scripts = ["1_first", "2_second", "10_third"]
    migrations = PluginMigrations("probe", tmp_path)
    assert pending_migrations(database, [migrations]) == {"probe": scripts}
    with schema_lock(database) as engine:
        assert migrate(engine, migrations) == scripts
    assert pending_migrations(database, [migrations]) == {}
    database.close()


SCRIPT = """
import sys
from corral.database.connect import connect
from corral.database.migrations import PluginMigrations, migrate, pending_migrations, schema_lock
from corral.database.migrations import KERNEL, migrate, pending_migrations, schema_lock

database = connect(sys.argv[1])
if pending_migrations(database, [KERNEL]):
    with schema_lock(database) as engine:
        migrate(engine, KERNEL)
print("playhouse.migrations" in sys.modules)
database.close()
"""


@pytest.mark.one_engine
def test_the_migrator_is_imported_only_to_apply_a_script(tmp_path: Path) -> None:
    def starts() -> str:
        command = [sys.executable, "-c", SCRIPT, f"sqlite:///{tmp_path}/corral.db"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert [starts(), starts()] == ["True", "False"]
