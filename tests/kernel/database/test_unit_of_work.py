"""The rules of the unit of work, each with its number in docs/concepts/unit-of-work.md."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

import peewee
import pytest
from tests.kernel.database.conftest import Note

from corral.database.connect import connect
from corral.database.engine import Database
from corral.database.sqlite import SqliteDatabase
from corral.database.unit import Entry, after_commit, current
from corral.errors import Conflict, NestedUnit, NoUnit, Refused, Unavailable
from corral.events import log as event_log
from corral.events.event import Event, emit
from corral.jobs.job import JobRow, enqueue


class Noted(Event, kw_only=True):
    """A note was made."""

    event = "note.made"

    key: str


def note(key: str, value: int = 0) -> str:
    Note.create(key=key, value=value)
    emit(Noted(key=key), object=("note", key))
    return key


def keys(database: Database) -> set[str]:
    return database.run(lambda: {row.key for row in Note.select()}, read=True)


def events(database: Database) -> list[Any]:
    if database.kind == "postgresql":
        database.run(event_log.number_committed)
    return database.run(lambda: event_log.read(0), read=True)


async def test_rule_1_a_read_unit_refuses_writes(database: Database) -> None:
    with pytest.raises(peewee.DatabaseError):
        await database.work(lambda: Note.create(key="a"), read=True)
    assert keys(database) == set()


def test_rule_3_outside_a_unit_is_no_unit(database: Database) -> None:
    with pytest.raises(NoUnit):
        Note.create(key="a")
    with pytest.raises(NoUnit):
        emit(Noted(key="a"), object=("note", "a"))
    with pytest.raises(NoUnit):
        enqueue("some.job")


async def test_rule_3_a_unit_in_a_unit_is_nested(database: Database) -> None:
    def outer() -> None:
        database.run(lambda: None)

    with pytest.raises(NestedUnit):
        await database.work(outer)


async def test_rule_5_a_failing_unit_is_rolled_back_alone(database: Database) -> None:
    def bad(index: int) -> None:
        note(f"bad{index}")
        raise Conflict("no")

    results = await asyncio.gather(
        *[database.work(lambda i=i: note(f"good{i}")) for i in range(20)],
        *[database.work(lambda i=i: bad(i)) for i in range(20)],
        return_exceptions=True,
    )
    assert sum(isinstance(result, Conflict) for result in results) == 20
    assert keys(database) == {f"good{i}" for i in range(20)}
    assert {record.object_id for record in events(database)} == {f"good{i}" for i in range(20)}


async def test_rule_5_an_answer_comes_after_commit(database: Database, open_database: Callable[[], Database]) -> None:
    other = open_database()
    for index in range(30):
        await database.work(lambda i=index: note(f"n{i}"))
        assert f"n{index}" in keys(other)


@pytest.mark.parametrize("unmade_database_url", [pytest.param("sqlite", marks=pytest.mark.sqlite)], indirect=True)
async def test_rule_5_waiting_units_share_a_commit(database: SqliteDatabase) -> None:
    commits = 0
    gate = threading.Event()
    deliver = database._writers.deliver

    def counting(outcomes: list[Any]) -> None:
        nonlocal commits
        commits += 1
        deliver(outcomes)

    database._writers.deliver = counting
    first = asyncio.ensure_future(database.work(lambda: gate.wait(1)))
    await asyncio.sleep(0.05)
    others = [asyncio.ensure_future(database.work(lambda i=i: note(f"n{i}"))) for i in range(40)]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(first, *others)
    assert commits <= 3
    assert len(keys(database)) == 40


@pytest.mark.parametrize("unmade_database_url", [pytest.param("sqlite", marks=pytest.mark.sqlite)], indirect=True)
async def test_rule_5_a_full_queue_is_overloaded(database: SqliteDatabase) -> None:
    gate = threading.Event()
    held = asyncio.ensure_future(database.work(lambda: gate.wait(1.5)))
    await asyncio.sleep(0.05)
    waiting = [asyncio.ensure_future(database.work(lambda: 1)) for _ in range(1100)]
    await asyncio.sleep(0.05)
    gate.set()
    results = await asyncio.gather(held, *waiting, return_exceptions=True)
    refused = [result for result in results if isinstance(result, Unavailable)]
    assert 90 <= len(refused) <= 101
    assert all(problem.code == "overloaded" for problem in refused)


@pytest.mark.parametrize("unmade_database_url", [pytest.param("sqlite", marks=pytest.mark.sqlite)], indirect=True)
async def test_rule_6_when_sqlite_ends_the_transaction_the_innocent_run_again(database: SqliteDatabase) -> None:
    """What disk full and I/O errors do: SQLite rolls back by itself, in the middle of a batch."""
    gate, broken = threading.Event(), []

    def breaks() -> str:
        Note.create(key="culprit")
        if not broken:
            broken.append(True)
            current().connection.execute("ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")
        return "second try"

    held = asyncio.ensure_future(database.work(lambda: gate.wait(1)))
    await asyncio.sleep(0.05)
    before = [asyncio.ensure_future(database.work(lambda i=i: note(f"n{i}"))) for i in range(5)]
    culprit = asyncio.ensure_future(database.work(breaks))
    after = [asyncio.ensure_future(database.work(lambda i=i: note(f"m{i}"))) for i in range(5)]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(held, *before, *after)
    assert await culprit == "second try"
    assert keys(database) == {f"n{i}" for i in range(5)} | {f"m{i}" for i in range(5)} | {"culprit"}
    assert len(events(database)) == 10


@pytest.mark.parametrize("unmade_database_url", [pytest.param("sqlite", marks=pytest.mark.sqlite)], indirect=True)
async def test_rule_6_a_failed_commit_answers_every_member(database: SqliteDatabase) -> None:
    class Full:
        """The writer's connection, on a disk that is full at COMMIT."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def execute(self, sql: str, *parameters: Any) -> Any:
            if sql == "COMMIT":
                raise sqlite3.OperationalError("database or disk is full")
            return self.real.execute(sql, *parameters)

    await database.work(lambda: note("before"))
    lane: Any = database._writers.lanes[0]
    lane.connection = Full(lane.connection)
    results = await asyncio.gather(
        *[database.work(lambda i=i: note(f"n{i}")) for i in range(5)], return_exceptions=True
    )
    assert [getattr(result, "code", None) for result in results] == ["storage_full"] * 5
    lane.connection = lane.connection.real
    await database.work(lambda: note("later"))
    assert keys(database) == {"before", "later"}


async def test_rule_7_a_unit_that_hangs_is_lost_and_the_others_run(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    slow = asyncio.ensure_future(database.work(lambda: (note("slow"), time.sleep(4)), entry=Entry("GET /slow")))
    await asyncio.sleep(0.1)
    others = await asyncio.gather(*[database.work(lambda i=i: note(f"n{i}")) for i in range(5)])
    with pytest.raises(Unavailable):
        await slow
    assert time.monotonic() - began < 3.5
    assert len(others) == 5
    assert "test_unit_of_work.py" in next(record.at for record in caplog.records if record.message == "unit lost")  # type: ignore[attr-defined]  # an extra
    await asyncio.sleep(0.1)
    assert keys(database) == {f"n{i}" for i in range(5)}


async def test_rule_7_a_unit_lost_between_its_rows_leaves_no_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it take the process along: its statements are the lane's to close. No garbage collector helps."""
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.3)
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT i FROM n"

    def read_on() -> None:
        note("lost")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for _ in current().database.engine.execute_sql(rows):
                pass

    gc.disable()
    try:
        for number in range(4):
            with pytest.raises(Unavailable):
                await database.work(read_on, entry=Entry(f"GET /rows/{number}"))
            await database.work(lambda number=number: note(f"n{number}"))
    finally:
        gc.enable()
    assert keys(database) == {f"n{number}" for number in range(4)}


async def test_rule_7_a_process_that_stood_still_loses_no_unit(database: Database) -> None:
    """`PyDLL` keeps the interpreter's lock: for three seconds nothing runs, as when a machine is paused."""
    await database.work(lambda: (note("paused"), ctypes.PyDLL(None).usleep(3_000_000)))
    assert keys(database) == {"paused"}


SLOW = Entry("GET /slow", request_id="r-1")


def counted(database: Any, label: str) -> float | None:
    """When a route lost its last unit, as far as that was counted."""
    pool = database._pool if database.kind == "postgresql" else database._writers
    return pool._losses.get(label)  # type: ignore[no-any-return]  # of the engine


async def lose(database: Database) -> None:
    """One unit, and wait until it is counted."""
    before = counted(database, SLOW.label)
    with pytest.raises(Unavailable, match="ran too long"):
        await database.work(lambda: time.sleep(2), entry=SLOW)
    async with asyncio.timeout(10):
        while counted(database, SLOW.label) == before:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)


async def test_rule_7_two_losses_hold_the_route_for_a_while(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.6)
    monkeypatch.setattr("corral.database.pool.HOLD_SECONDS", 5.0)
    for _ in range(2):
        await lose(database)
    for _ in range(3):
        with pytest.raises(Unavailable) as refused:
            await database.work(lambda: 1, entry=SLOW)
        assert (refused.value.code, int(refused.value.headers["Retry-After"]) in (3, 4, 5)) == ("plugin_failed", True)
    assert await database.work(lambda: 1, entry=Entry("GET /other", request_id="r-2")) == 1
    await asyncio.sleep(5.2)
    await lose(database)  # it may try again, and is held again at its next loss
    with pytest.raises(Unavailable, match="held"):
        await database.work(lambda: 1, entry=SLOW)
    await asyncio.sleep(5.2)
    assert await database.work(lambda: 1, entry=SLOW) == 1
    with pytest.raises(Unavailable, match="held"):  # the others follow when the first was not lost
        await database.work(lambda: 1, entry=SLOW)
    await asyncio.sleep(1.4)
    assert await asyncio.gather(*[database.work(lambda: 1, entry=SLOW) for _ in range(3)]) == [1, 1, 1]
    await lose(database)
    assert await database.work(lambda: 1, entry=SLOW) == 1  # all is forgotten


async def test_rule_7_only_routes_are_held(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What everybody needs, such as the look at a credential or the sequencer, is nobody's to take away."""
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.3)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await database.work(lambda: time.sleep(1), entry=Entry("authentication"))
        await asyncio.sleep(0.3)
    assert await database.work(lambda: 1, entry=Entry("authentication")) == 1


async def test_rule_7_losses_at_the_same_time_are_one(
    open_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.3)
    database = open_database()
    await asyncio.gather(*[database.work(lambda: 1, read=True) for _ in range(20)])  # every lane is there
    lost = await asyncio.gather(
        *[database.work(lambda: time.sleep(1), entry=SLOW, read=True) for _ in range(3)], return_exceptions=True
    )
    assert [type(each) for each in lost] == [Unavailable] * 3
    await asyncio.sleep(0.5)
    assert await database.work(lambda: 1, entry=SLOW, read=True) == 1


async def test_rule_9_audit_jobs_and_events_are_written_last_in_this_order(database: Database) -> None:
    seen: list[str] = []

    def unit() -> None:
        emit(Noted(key="a"), object=("note", "a"))
        enqueue("some.job", id="a")
        current().audit.append(lambda: seen.append(f"jobs {JobRow.select().count()}"))
        Note.create(key="a")
        assert JobRow.select().count() == 0
        assert event_log.EventRow.select().count() == 0

    await database.work(unit)
    assert seen == ["jobs 0"]
    assert database.run(lambda: JobRow.get().arguments, read=True) == {"id": "a"}
    assert len(events(database)) == 1


async def test_rule_10_a_later_number_never_appears_before_an_earlier_one(
    database: Database, open_database: Callable[[], Database]
) -> None:
    """Two processes write while a reader follows the log by cursor: it must meet every event exactly once."""
    other, seen, stop = open_database(), [], threading.Event()

    def follow() -> None:
        cursor = 0
        while True:
            last_round = stop.is_set()
            if database.kind == "postgresql":
                other.run(event_log.number_committed)
            for record in other.run(lambda after=cursor: event_log.read(after), read=True):
                seen.append(record.object_id)
                cursor = record.seq
            if last_round:
                return

    def write(source: Database, name: str) -> None:
        for index in range(100):
            source.run(lambda i=index: note(f"{name}{i}"))

    reader = threading.Thread(target=follow)
    writers = [
        threading.Thread(target=write, args=(source, f"{name}-"))
        for name, source in {"a": database, "b": other, "c": database, "d": other}.items()
    ]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert len(seen) == len(set(seen)) == 400
    for name in "abcd":
        assert [key for key in seen if key.startswith(f"{name}-")] == [f"{name}-{i}" for i in range(100)]


async def test_rule_11_after_commit_runs_once_on_the_loop_and_not_after_a_failure(database: Database) -> None:
    database.attach(asyncio.get_running_loop())
    ran: list[str] = []

    def good() -> None:
        note("a")
        after_commit(lambda: ran.append(threading.current_thread().name))

    def bad() -> None:
        after_commit(lambda: ran.append("never"))
        raise Conflict("no")

    await database.work(good)
    with pytest.raises(Conflict):
        await database.work(bad)
    assert ran == [threading.main_thread().name]


async def test_rule_11_stop_iteration_is_an_answer_too(database: Database) -> None:
    """No future can be given it: those that share the COMMIT with such a unit would wait for ever."""

    def ends() -> None:
        next(iter([]))

    others = [database.work(lambda i=i: note(f"n{i}")) for i in range(5)]
    async with asyncio.timeout(5):
        ended, *told = await asyncio.gather(database.work(ends), *others, return_exceptions=True)
    assert isinstance(ended, RuntimeError)
    assert isinstance(ended.__cause__, StopIteration)
    assert told == [f"n{i}" for i in range(5)]
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(database.run, ends, read=True)


async def test_rule_15_what_an_answer_told_is_visible_to_the_next_read(
    database: Database, open_database: Callable[[], Database]
) -> None:
    other = open_database()
    for value in range(50):
        await database.work(lambda v=value: Note.replace(key="k", value=v).execute() if database.kind == "sqlite" else (
            Note.insert(key="k", value=v).on_conflict(conflict_target=[Note.key], update={"value": v}).execute()
        ))  # fmt: skip
        assert other.run(lambda: Note.get_by_id("k").value, read=True) == value
        assert await database.work(lambda: Note.get_by_id("k").value, read=True) == value


@pytest.mark.parametrize("unmade_database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
async def test_rule_4_a_deadlock_runs_again(database: Database) -> None:
    await database.work(lambda: (note("a"), note("b")))

    def swap(first: str, second: str) -> None:
        Note.update(value=Note.value + 1).where(Note.key == first).execute()
        time.sleep(0.2)
        Note.update(value=Note.value + 1).where(Note.key == second).execute()

    await asyncio.gather(database.work(lambda: swap("a", "b")), database.work(lambda: swap("b", "a")))
    assert database.run(lambda: {row.key: row.value for row in Note.select()}, read=True) == {"a": 2, "b": 2}


@pytest.mark.parametrize("unmade_database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
async def test_rule_4_a_connection_lost_before_commit_runs_again(database: Database, postgres_server: Any) -> None:
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


@pytest.mark.parametrize("unmade_database_url", [pytest.param("sqlite", marks=pytest.mark.sqlite)], indirect=True)
async def test_t14_two_processes_writing_meet_no_lock_error(
    database: Database, open_database: Callable[[], Database]
) -> None:
    others = [open_database() for _ in range(3)]

    def write(source: Database, name: str) -> None:
        for index in range(60):
            source.run(lambda i=index: note(f"{name}-{i}"))

    threads = [threading.Thread(target=write, args=(source, str(i))) for i, source in enumerate((database, *others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys(database)) == 240


POSTGRES = pytest.mark.parametrize(
    "unmade_database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


@POSTGRES
async def test_a_database_that_takes_no_writes_is_away_until_it_does_again(database: Database) -> None:
    """A standby after a failover, or a server whose operator allows reading only."""
    import psycopg

    await database.work(lambda: note("before"))
    name = database.run(lambda: current().connection.execute("SELECT current_database()").fetchone()[0], read=True)
    with psycopg.connect(database.engine.database, autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                      " AND datname = %s", (name,))  # fmt: skip
        for number in range(8):  # more than there are connections
            with pytest.raises(Unavailable) as refused:
                await database.work(lambda number=number: note(f"refused-{number}"))
            assert (refused.value.status, refused.value.code) == (503, "dependency_unavailable")
        assert keys(database) == {"before"}
        admin.execute("SET default_transaction_read_only = off")
        admin.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())
        for number in range(8):
            await database.work(lambda number=number: note(f"after-{number}"))
    assert len(keys(database)) == 9


@POSTGRES
async def test_a_unit_that_hides_a_failed_statement_is_not_told_to_be_saved(database: Database) -> None:
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
    with pytest.raises(Refused, match=r"database\.url") as refused:
        connect(url)
    assert "hunter" not in str(refused.value)
