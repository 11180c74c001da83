"""Migrations: numbered scripts, applied under a lock. Each plugin has one script directory and one history table."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec
import peewee
from playhouse.migrations import Migration, Runner

from corral import clock
from corral.database.engine import Database
from corral.errors import Refused

COPIES = 3  # number of copies of an SQLite file that are kept from before the last migrations
LOCKS = {"migrate": 0x434F5252, "start": 0x434F5253}  # keys of advisory locks; the first four bytes are "CORR"


class Home(msgspec.Struct, frozen=True):
    """The migrations of one plugin: the directory of its scripts. The history table is `<plugin>_migrations`."""

    plugin: str
    directory: Path


KERNEL = Home("kernel", Path(__file__).with_suffix(""))
"""The kernel's own tables: events, consumers, jobs, schedules, leases and idempotent responses."""


class MigrationFailed(Exception):
    """Raised when a script failed and was rolled back. `plugin` and `script` identify the script."""

    def __init__(self, plugin: str, script: str, reason: str) -> None:
        self.plugin, self.script = plugin, script
        super().__init__(f"{plugin}: migration {script} failed: {reason}")


class Newer(Exception):
    """Raised when the database contains migrations, applied by a newer release, that this release does not know."""


def pending(database: Database, homes: Iterable[Home]) -> dict[str, list[str]]:
    """Return the names of the scripts that are not yet applied, by plugin. Raises `Newer`."""
    with own_connection(database) as engine:
        return {home.plugin: names for home in homes if (names := pending_of(engine, home, tables_of(engine)))}


def migrate(database: Database, home: Home) -> list[str]:
    """Apply the pending scripts of one plugin, each in a transaction, and return their names."""
    with own_connection(database) as engine, schema_lock(engine):
        applied: list[str] = []
        runner = Runner(engine, str(home.directory), table_name=f"{home.plugin}_migrations")
        for name in pending_of(engine, home, tables_of(engine)):
            try:
                runner.up(name)
            except Exception as error:
                raise MigrationFailed(home.plugin, name, str(error)) from error
            applied.append(name)
        if applied and isinstance(engine, peewee.SqliteDatabase):
            broken = engine.execute_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise MigrationFailed(home.plugin, applied[-1], f"{len(broken)} rows break a foreign key")
        return applied


def is_empty(database: Database) -> bool:
    """Return whether the database has no tables."""
    with own_connection(database) as engine:
        return not tables_of(engine)


def tables_of(engine: peewee.Database) -> list[str]:
    """Return the tables of the current schema, which the `search_path` of the URL may select."""
    is_sqlite = isinstance(engine, peewee.SqliteDatabase)
    return list(engine.get_tables(None if is_sqlite else engine.execute_sql("SELECT current_schema()").fetchone()[0]))


def pending_of(engine: peewee.Database, home: Home, tables: Collection[str]) -> list[str]:
    """Return the names of the scripts of one plugin that are not yet applied to the database with these tables.

    Raises `Newer`.
    """
    table, known = f"{home.plugin}_migrations", [each.name for each in Migration.load_directory(str(home.directory))]
    rows = engine.execute_sql(f'SELECT name FROM "{table}"').fetchall() if table in tables else []  # noqa: S608
    if unknown := sorted({name for (name,) in rows}.difference(known)):
        raise Newer(f"{home.plugin}: the database has {unknown[-1]}, which this release does not know")
    return [name for name in known if (name,) not in rows]


def keep_copy(engine: peewee.SqliteDatabase) -> None:
    """Copy the SQLite file before migrations change it, and keep the newest three copies.

    Raises `Refused` if the copy fails, for example on a full disk.
    """
    copy = Path(f"{engine.database}.before-{clock.now().replace(':', '')}")
    try:
        engine.execute_sql("VACUUM INTO ?", (str(copy),))
    except peewee.OperationalError as error:
        for part in copy.parent.glob(f"{copy.name}*"):  # including its journal
            part.unlink()
        reason = f"{engine.database}: it cannot be copied before it is migrated ({error}), and was not changed"
        raise Refused(f"{reason}; make room for {copy} and start again") from None
    copy.chmod(0o600)
    for old in sorted(copy.parent.glob(f"{Path(engine.database).name}.before-*"))[:-COPIES]:
        old.unlink()


@contextlib.contextmanager
def own_connection(database: Database) -> Iterator[peewee.Database]:
    """Open a separate connection for migrations.

    On SQLite, foreign keys are off, because they cannot be switched off inside a transaction.
    """
    if isinstance(database.engine, peewee.SqliteDatabase):
        engine: peewee.Database = peewee.SqliteDatabase(
            database.engine.database, pragmas={"foreign_keys": 0, "busy_timeout": 30000, "journal_mode": "wal"}
        )
    else:
        engine = peewee.PostgresqlDatabase(database.engine.database, prefer_psycopg3=True, connect_timeout=2)
    engine.connect()
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def exclusive_start(database: Database) -> Iterator[peewee.Database]:
    """Open a connection that holds the start lock.

    If several processes start together, only one of them applies the pending migrations.
    """
    with own_connection(database) as engine, schema_lock(engine, "start"):
        yield engine


@contextlib.contextmanager
def schema_lock(engine: peewee.Database, name: str = "migrate") -> Iterator[None]:
    if isinstance(engine, peewee.SqliteDatabase):
        with Path(f"{engine.database}.{name}-lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    else:
        engine.execute_sql("SELECT pg_advisory_lock(%s)", (LOCKS[name],))  # held until the connection is closed
        yield
