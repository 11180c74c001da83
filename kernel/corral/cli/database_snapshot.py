"""Reads all tables in one database snapshot while other processes write, and fills the tables of a new database."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import peewee

from corral.database.engine import Database
from corral.database.leases import Lease
from corral.database.migrations import existing_tables, own_connection
from corral.database.model import Model
from corral.events.consumers import ConsumerRow
from corral.events.log import EventRow
from corral.http.idempotency import IdempotencyRow
from corral.jobs.job import JobRow, ScheduleRow
from corral.plugins.record import PluginRecord

KERNEL_MODELS: tuple[type[Model], ...] = (EventRow, ConsumerRow, JobRow, ScheduleRow, Lease, IdempotencyRow)
HISTORY = "_migrations"  # the suffix of the tables with the applied migrations of a plugin
FETCH = 1000
PG_BOOLEAN = 16  # the object id of the type `boolean`

Rows = tuple[list[str], Iterator[tuple[Any, ...]]]


def models_of(records: Iterable[PluginRecord]) -> dict[str, type[Model]]:
    """Return the models of the kernel and of the active plugins, keyed by table name."""
    models = [
        *KERNEL_MODELS,
        *(model for record in records if record.active for model in record.contributions_to("corral_models")),
    ]
    return {model._meta.table_name: model for model in models}


class Snapshot:
    """A consistent view of the database that later writes do not change. Writers are not blocked."""

    def __init__(self, engine: peewee.Database) -> None:
        self._engine = engine
        self._tables = existing_tables(engine)

    def tables(self, known: Iterable[str]) -> list[str]:
        """Return the tables in `known` that exist."""
        return sorted({*known} & {*self._tables})

    def schemas(self) -> dict[str, list[str]]:
        """Return the applied migration scripts of each plugin, oldest first."""
        names = sorted(table.removesuffix(HISTORY) for table in self._tables if table.endswith(HISTORY))
        return {
            name: [row[0] for row in self._engine.execute_sql(f'SELECT name FROM "{name}{HISTORY}" ORDER BY name')]  # noqa: S608
            for name in names
        }

    def read(self, table: str) -> Rows:
        """Return the column names of a table and an iterator over its rows, which are fetched in batches."""
        connection: Any = self._engine.connection()
        is_sqlite = isinstance(self._engine, peewee.SqliteDatabase)
        cursor = connection.cursor() if is_sqlite else connection.cursor(name="corral_backup")
        cursor.execute(f'SELECT * FROM "{table}"')  # noqa: S608  (names of the schema)
        return [column[0] for column in cursor.description], _fetch(cursor)


def _fetch(cursor: Any) -> Iterator[tuple[Any, ...]]:
    with contextlib.closing(cursor):
        while rows := cursor.fetchmany(FETCH):
            yield from rows


@contextlib.contextmanager
def open_snapshot(database: Database) -> Iterator[Snapshot]:
    """Open a snapshot on a separate connection."""
    with own_connection(database) as engine:
        is_sqlite = isinstance(engine, peewee.SqliteDatabase)
        connection: Any = engine.connection()
        connection.execute("BEGIN" if is_sqlite else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        try:
            yield Snapshot(engine)
        finally:
            connection.execute("ROLLBACK")


def insert_rows(engine: peewee.Database, table: str, rows: Iterator[list[Any]]) -> None:
    """Fill a table with rows from an archive, replacing any rows that migrations have inserted.

    The first item of `rows` contains the column names. An archive of an SQLite database contains booleans as numbers,
    which are converted for PostgreSQL.
    """
    is_sqlite = isinstance(engine, peewee.SqliteDatabase)
    columns, cursor = next(rows), engine.cursor()
    names, marks = ", ".join(f'"{name}"' for name in columns), ", ".join(["?" if is_sqlite else "%s"] * len(columns))
    cursor.execute(f'DELETE FROM "{table}"')  # noqa: S608  (names of the schema)
    cursor.execute(f'SELECT {names} FROM "{table}"')  # noqa: S608
    truth = [] if is_sqlite else [at for at, column in enumerate(cursor.description) if column[1] == PG_BOOLEAN]
    insert = f'INSERT INTO "{table}" ({names}) VALUES ({marks})'  # noqa: S608
    while batch := list(islice(rows, FETCH)):
        for row in batch:
            for at in truth:
                row[at] = None if row[at] is None else bool(row[at])
        cursor.executemany(insert, batch)


def continue_numbering(engine: peewee.Database, model: type[Model]) -> None:
    """Set the sequence of a table's automatic key to the highest key in the table. SQLite does this automatically."""
    key = model._meta.primary_key
    if isinstance(key, peewee.AutoField) and not isinstance(engine, peewee.SqliteDatabase):
        table, column = model._meta.table_name, key.column_name
        engine.execute_sql(
            f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), MAX({column})) FROM {table}"  # noqa: S608
        )


@contextlib.contextmanager
def long_transaction(database: Database) -> Iterator[peewee.Database]:
    """Run a transaction on this thread's connection, without the time limit of a unit of work."""
    engine = database.engine
    engine.connect()
    if not isinstance(engine, peewee.SqliteDatabase):
        engine.execute_sql("SET statement_timeout = 0")
    with engine.atomic():
        yield engine
