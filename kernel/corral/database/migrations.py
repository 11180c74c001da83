"""Migrations: numbered scripts, applied under a lock. Each plugin has one script directory and one history table.

The module `playhouse.migrations` is imported only if there is a script to apply, because the import takes 3 % of the
startup time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec
import peewee

from corral import clock
from corral.database.engine import Database
from corral.errors import StartupError

COPIES = 3  # number of copies of an SQLite file that are kept from before the last migrations
LOCK = 0x434F5252  # the key of the advisory lock: "CORR"


class PluginMigrations(msgspec.Struct, frozen=True):
    """The migrations of one plugin.

    `directory` contains the scripts. The `<plugin>_migrations` table records the applied scripts.
    """

    plugin: str
    directory: Path


KERNEL = PluginMigrations("kernel", Path(__file__).with_suffix(""))
"""The migrations of the kernel's own tables: events, consumers, jobs, schedules, leases and idempotency keys."""


class MigrationFailed(Exception):
    """Raised when a migration script failed and was rolled back, or when the scripts left broken foreign keys."""


class SchemaTooNew(Exception):
    """Raised when the database contains migrations of a newer release, which this release does not know."""


def pending_migrations(database: Database, all_migrations: Iterable[PluginMigrations]) -> dict[str, list[str]]:
    """Return the names of the scripts that have not been applied yet, grouped by plugin.

    Raise `SchemaTooNew` if the database contains migrations that this release does not know.
    """
    with own_connection(database) as engine:
        tables = existing_tables(engine)
        return {each.plugin: names for each in all_migrations if (names := pending_scripts(engine, each, tables))}


def migrate(engine: peewee.Database, migrations: PluginMigrations) -> list[str]:
    """Apply the pending scripts of one plugin, each in a transaction, and return their names.

    `engine` is the connection that `schema_lock` opened. Raise `MigrationFailed` if a script fails, or if the scripts
    leave broken foreign keys in an SQLite database.
    """
    from playhouse.migrations import Runner

    plugin, scripts = migrations.plugin, pending_scripts(engine, migrations, existing_tables(engine))
    runner = Runner(engine, str(migrations.directory), table_name=f"{plugin}_migrations")
    for name in scripts:
        try:
            runner.up(name)
        except (Exception, SystemExit) as error:
            raise MigrationFailed(f"{plugin}: migration {name} failed: {error}") from error
    if scripts and isinstance(engine, peewee.SqliteDatabase):
        broken = engine.execute_sql("PRAGMA foreign_key_check").fetchall()
        if broken:
            raise MigrationFailed(f"{plugin}: migration {scripts[-1]} leaves {len(broken)} broken foreign keys")
    return scripts


def existing_tables(engine: peewee.Database) -> list[str]:
    """Return the tables of the current schema.

    On PostgreSQL, the `search_path` in the URL can select another schema.
    """
    is_sqlite = isinstance(engine, peewee.SqliteDatabase)
    return list(engine.get_tables(None if is_sqlite else engine.execute_sql("SELECT current_schema()").fetchone()[0]))


def pending_scripts(engine: peewee.Database, migrations: PluginMigrations, tables: Collection[str]) -> list[str]:
    """Return the names of one plugin's scripts that are not yet applied to a database with the given tables.

    Raise `SchemaTooNew` if the database contains migrations of the plugin that this release does not know.
    """
    table = f"{migrations.plugin}_migrations"
    # `Path.glob` is ten times as slow.
    names = [file[:-3] for file in os.listdir(migrations.directory) if file[0].isdigit() and file.endswith(".py")]
    known = sorted(names, key=lambda name: (int(re.split(r"\D", name, maxsplit=1)[0]), name))
    rows = engine.execute_sql(f'SELECT name FROM "{table}"').fetchall() if table in tables else []  # noqa: S608
    if unknown := sorted({name for (name,) in rows}.difference(known)):
        raise SchemaTooNew(f"{migrations.plugin}: the database has {unknown[-1]}, which this release does not know")
    return [name for name in known if (name,) not in rows]


def copy_before_migration(engine: peewee.SqliteDatabase) -> None:
    """Copy the SQLite file before migrations change it, and keep the newest three copies.

    Raise `StartupError` if the copy fails, for example on a full disk.
    """
    copy = Path(f"{engine.database}.before-{clock.now().replace(':', '')}")
    try:
        engine.execute_sql("VACUUM INTO ?", (str(copy),))
    except peewee.OperationalError as error:
        for part in copy.parent.glob(f"{copy.name}*"):  # including its journal
            part.unlink()
        reason = f"{engine.database} could not be copied before its migration ({error}) and was not changed"
        raise StartupError(f"{reason}; free up disk space for {copy} and start again") from None
    copy.chmod(0o600)
    for old in sorted(copy.parent.glob(f"{Path(engine.database).name}.before-*"))[:-COPIES]:
        old.unlink()


@contextlib.contextmanager
def own_connection(database: Database) -> Iterator[peewee.Database]:
    """Open a separate connection for migrations.

    On SQLite, foreign key checks are disabled for the connection, because they cannot be disabled inside a transaction.
    """
    if isinstance(database.engine, peewee.SqliteDatabase):
        engine: peewee.Database = peewee.SqliteDatabase(
            database.engine.database, pragmas={"foreign_keys": 0, "busy_timeout": 30000, "journal_mode": "wal"}
        )
    else:
        engine = peewee.PostgresqlDatabase(database.engine.database, prefer_psycopg3=True, connect_timeout=2)
    with engine.connection_context():
        yield engine


@contextlib.contextmanager
def schema_lock(database: Database) -> Iterator[peewee.Database]:
    """Open a connection that holds the schema lock while the context is active.

    If several processes start at the same time, only one of them applies the pending migrations.
    """
    with own_connection(database) as engine, contextlib.ExitStack() as stack:
        if isinstance(engine, peewee.SqliteDatabase):
            file = stack.enter_context(Path(f"{engine.database}.migrate-lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            engine.execute_sql("SELECT pg_advisory_lock(%s)", (LOCK,))  # held until the connection is closed
        yield engine
