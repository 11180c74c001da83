"""What only PostgreSQL does to a unit of work: deadlocks, lost connections, standbys, options of its URL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Any

import peewee
import pytest
from tests.engines import POSTGRES
from tests.kernel.database.conftest import Note, keys, note

from corral.database.connect import connect
from corral.database.engine import Database
from corral.database.unit import Unit, current
from corral.errors import StartupError, Unavailable


@POSTGRES
async def test_unit_of_work_4_a_deadlock_runs_again(database: Database) -> None:
    await database.work(lambda: (note("a"), note("b")))

    def swap(first: str, second: str) -> None:
        Note.update(value=Note.value + 1).where(Note.key == first).execute()
        time.sleep(0.2)
        Note.update(value=Note.value + 1).where(Note.key == second).execute()

    await asyncio.gather(database.work(lambda: swap("a", "b")), database.work(lambda: swap("b", "a")))
    assert database.run(lambda: {row.key: row.value for row in Note.select()}, read=True) == {"a": 2, "b": 2}


@POSTGRES
async def test_unit_of_work_4_a_connection_lost_before_commit_runs_again(
    database: Database, postgres_server: Any
) -> None:
    import psycopg

    killed: list[int] = []

    def unit() -> None:
        note(f"k{len(killed)}")
        if not killed:
            pid = current().connection.execute("SELECT pg_backend_pid()").fetchone()[0]
            killed.append(pid)
            with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
                admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
            time.sleep(0.1)
        Note.select().count()

    await database.work(unit)
    assert keys(database) == {"k1"}


@POSTGRES
async def test_unit_of_work_4_a_unit_is_tried_three_times(database: Database) -> None:
    tries: list[int] = []

    def unit() -> None:
        note(f"try-{len(tries)}")
        tries.append(1)
        current().connection.execute("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")

    with pytest.raises(Unavailable) as refused:
        await database.work(unit)
    assert (refused.value.status, len(tries), keys(database)) == (503, 3, set())


@POSTGRES
async def test_unit_of_work_4_a_connection_lost_during_commit_never_runs_again(
    database: Database, postgres_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends the connection after the last statement, so that COMMIT is what finds out."""
    import psycopg

    runs: list[int] = []
    finish = Unit.finish

    def finish_and_lose(unit: Unit) -> None:
        finish(unit)
        pid = unit.connection.execute("SELECT pg_backend_pid()").fetchone()[0]
        with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

    def write() -> None:
        runs.append(1)
        Note.create(key="lost")  # no event, which would be written last

    monkeypatch.setattr(Unit, "finish", finish_and_lose)
    with pytest.raises(Unavailable, match="during the commit"):
        await database.work(write)
    monkeypatch.setattr(Unit, "finish", finish)
    assert (len(runs), keys(database)) == (1, set())


@POSTGRES
async def test_unit_of_work_5_each_unit_is_a_transaction_on_a_pooled_connection(database: Database) -> None:
    def unit() -> tuple[int, int]:
        connection = current().connection
        (transaction,) = connection.execute("SELECT txid_current()").fetchone()
        time.sleep(0.01)
        pid, same = connection.execute("SELECT pg_backend_pid(), txid_current()").fetchone()
        assert transaction == same
        return int(pid), int(transaction)

    told = await asyncio.gather(*[database.work(unit) for _ in range(20)])
    assert len({transaction for _, transaction in told}) == 20
    assert len({connection for connection, _ in told}) <= 4


@POSTGRES
async def test_a_database_that_takes_no_writes_is_away_until_it_does_again(database: Database) -> None:
    """A standby after a failover, or a server whose operator allows reading only."""
    import psycopg

    await database.work(lambda: note("before"))
    name = database.run(lambda: current().connection.execute("SELECT current_database()").fetchone()[0], read=True)
    with psycopg.connect(database.engine.database, autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = %s",
            (name,),
        )
        for number in range(8):  # more than there are connections
            with pytest.raises(Unavailable) as refused:
                await database.work(partial(note, f"refused-{number}"))
            assert (refused.value.status, refused.value.code) == (503, "dependency_unavailable")
        assert keys(database) == {"before"}
        admin.execute("SET default_transaction_read_only = off")
        admin.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())
        for number in range(8):
            await database.work(partial(note, f"after-{number}"))
    assert len(keys(database)) == 9


@POSTGRES
async def test_unit_of_work_6_a_unit_that_hides_a_failed_statement_is_not_told_to_be_saved(database: Database) -> None:
    """PostgreSQL answers such a COMMIT by rolling back, without an error."""

    def twice() -> None:
        Note.create(key="k")
        with contextlib.suppress(peewee.IntegrityError):
            Note.create(key="k")

    with pytest.raises(RuntimeError, match="savepoint"):
        await database.work(twice)
    assert keys(database) == set()
    await database.work(lambda: note("next"))
    assert keys(database) == {"next"}


@POSTGRES
def test_options_of_the_url_hold_beside_those_of_the_product(database: Database) -> None:
    database.run(lambda: current().connection.execute("CREATE SCHEMA own"))
    elsewhere = connect(f"{database.engine.database}&options=-c%20search_path%3Down", pool_size=1)
    try:
        told = elsewhere.run(
            lambda: [
                current().connection.execute(f"SHOW {name}").fetchone()[0]
                for name in ("search_path", "statement_timeout")
            ]
        )
    finally:
        elsewhere.close()
    assert told == ["own", "2s"]


@pytest.mark.parametrize(
    "url", ["postgresql://u:hunter%zz@h/db", "postgresql://u:hunter@[::1/db", "postgresql://h?hunter=1"]
)
def test_a_url_that_the_driver_cannot_read_is_refused_without_what_is_in_it(url: str) -> None:
    with pytest.raises(StartupError, match=r"database\.url") as refused:
        connect(url)
    assert "hunter" not in str(refused.value)
