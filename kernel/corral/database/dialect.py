"""Helpers for cases in which SQLite and PostgreSQL need different SQL, so that the same plugin code runs on both.

Peewee translates ordinary queries, including upserts (`on_conflict`). These helpers cover the rest. They run in the
caller's unit of work, except for those that take a migration's peewee database. Row locks are in `unit`, and full-text
search is in `full_text`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import peewee

from corral.database.statement import execute_native
from corral.database.unit import current


def on_sqlite(database: peewee.Database | None = None) -> bool:
    """Return whether the given database, by default the database of the current unit of work, is SQLite.

    Only modules of this package may call this function.
    """
    return current().database.kind == "sqlite" if database is None else isinstance(database, peewee.SqliteDatabase)


def stores_rows_in_primary_key(database: peewee.Database) -> bool:
    """Return whether the engine can store a table's rows in its primary key (`without_rowid`).

    Migrations use this function.
    """
    return on_sqlite(database)


def _with_native_placeholders(sql: str) -> str:
    """Return the SQL with each `?` replaced by the engine's parameter marker. `?` must not have any other meaning."""
    return sql if on_sqlite() else sql.replace("%", "%%").replace("?", "%s")


def execute(sql: str, parameters: Sequence[Any] = ()) -> Any:
    """Execute raw SQL in the current unit of work and return the driver's cursor.

    `?` marks a parameter on both engines.

    Raises peewee's exceptions.
    """
    return execute_native(current().connection.execute, _with_native_placeholders(sql), parameters)


def sql_fragment(sql: str, parameters: Sequence[Any] = ()) -> peewee.SQL:
    """Return raw SQL with `?` markers for use in a peewee query."""
    return peewee.SQL(_with_native_placeholders(sql), parameters)


@contextlib.contextmanager
def savepoint() -> Iterator[None]:
    """Run a block of statements in a savepoint. If the block raises an exception, its effects are undone.

    All rows, events, jobs, audit rows and callbacks that the block has added to the unit of work are discarded. On
    PostgreSQL, a failed statement aborts the whole transaction unless the statement is inside a savepoint.
    """
    unit = current()
    buffers: tuple[list[Any], ...] = (unit.collected, unit.jobs, unit.audit, unit.after, unit.before)
    lengths = [len(buffer) for buffer in buffers]
    unit.connection.execute("SAVEPOINT part")
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # it fails if the transaction has ended, and would replace the error
            unit.connection.execute("ROLLBACK TO SAVEPOINT part")
            unit.connection.execute("RELEASE SAVEPOINT part")
        for buffer, length in zip(buffers, lengths, strict=True):
            del buffer[length:]
        raise
    unit.connection.execute("RELEASE SAVEPOINT part")


def advisory_lock(name: str) -> None:
    """Acquire a named lock, which only one unit of work at a time can hold, until the end of the transaction.

    If a unit counts rows while it holds the lock, it can rely on the count. Does nothing on SQLite, where only one unit
    writes at a time.
    """
    if not on_sqlite():
        execute("SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", (name,))


def counter_shard(shards: int) -> int:
    """Return the number of the counter shard that this thread should update.

    Threads update different shards, so parallel units of work do not block each other. The number is always 0 on
    SQLite, which has only one writer.
    """
    return 0 if current().database.kind == "sqlite" else threading.get_native_id() % shards


def epoch_seconds(column: str) -> str:
    """Return SQL that converts an instant column to whole seconds since the epoch."""
    if on_sqlite():
        return f"CAST(strftime('%s', {column}) AS INTEGER)"
    return f"CAST(FLOOR(EXTRACT(EPOCH FROM CAST({column} AS timestamptz))) AS BIGINT)"


def milliseconds_between(since: str, until: str) -> str:
    """Return SQL for the milliseconds between two instant columns. The result is null when one of them is null."""
    if on_sqlite():
        return f"CAST(ROUND((julianday({until}) - julianday({since})) * 86400000) AS INTEGER)"
    elapsed = f"CAST({until} AS timestamptz) - CAST({since} AS timestamptz)"
    return f"CAST(ROUND(EXTRACT(EPOCH FROM ({elapsed})) * 1000) AS BIGINT)"


def json_array_strings(alias: str) -> str:
    """Return SQL for a table named `alias` that has one row for each string in a JSON array.

    The array is passed as the parameter `?`, and each string is in the `value` column.
    """
    return f"json_each(?) AS {alias}" if on_sqlite() else f"json_array_elements_text(CAST(? AS json)) AS {alias}(value)"


def by_code_point(field: Any) -> Any:
    """Return the text field with a collation that sorts by code point, as Python does.

    The sort order then does not depend on the locale of the database.
    """
    return field if on_sqlite() else field.collate('"C"')


def append_only(database: peewee.Database, table: str, *, unique: Sequence[str], deletable: str) -> None:
    """Add triggers that prevent rows of a table from being changed, replaced or deleted. Migrations use this function.

    Rows may be deleted if the SQL condition `deletable` is true for `OLD`. `unique` lists the columns whose values are
    unique. On SQLite, a trigger refuses to insert a row if one of its unique values already exists, because `INSERT OR
    REPLACE` would delete the existing row without calling the trigger for deletions.
    """
    refused = f"these rows of {table} cannot be changed or deleted"
    if on_sqlite(database):
        equal = " OR ".join(f"{column} = NEW.{column}" for column in unique)
        exists = f"EXISTS (SELECT 1 FROM {table} WHERE {equal})"  # noqa: S608  (names of the schema)
        for event, condition in (("UPDATE", "1"), ("DELETE", f"NOT ({deletable})"), ("INSERT", exists)):
            database.execute_sql(
                f"CREATE TRIGGER {table}_no_{event.lower()} BEFORE {event} ON {table} WHEN {condition} "
                f"BEGIN SELECT RAISE(ABORT, '{refused}'); END"
            )
        return
    allowed = f"IF TG_OP = 'DELETE' THEN IF {deletable} THEN RETURN OLD; END IF; END IF;"
    head = f"CREATE OR REPLACE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS"
    database.execute_sql(f"{head} $$ BEGIN {allowed} RAISE EXCEPTION '{refused}'; END $$")
    for event, scope in (("UPDATE", "ROW"), ("DELETE", "ROW"), ("TRUNCATE", "STATEMENT")):
        database.execute_sql(
            f"CREATE TRIGGER {table}_no_{event.lower()} BEFORE {event} ON {table} FOR EACH {scope} "
            f"EXECUTE FUNCTION {table}_refuse()"
        )
