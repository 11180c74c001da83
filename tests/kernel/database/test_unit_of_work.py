"""The rules of the unit of work, each with its number in docs/concepts/unit-of-work.md.

Rule 7 has a file of its own, and what only PostgreSQL does is in `test_postgres.py`. The rules of handlers (1, 13, 14)
are tested in `tests/kernel/http`, those of everything that is active (2, 8) in `tests/generated/test_units.py`, calls
outward (12) in `tests/plugins/llm/test_gateway.py`, and uploads (13) in `tests/kernel/test_storage.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import peewee
import pytest
from tests.engines import SQLITE
from tests.kernel.database.conftest import Note, Noted, events, keys, note

from corral.database import pool, sqlite
from corral.database.dialect import savepoint
from corral.database.engine import Database
from corral.database.pool import QueuedUnit
from corral.database.sqlite import SqliteDatabase
from corral.database.unit import UnitContext, after_commit, collect, current
from corral.errors import Conflict, NestedUnit, NoUnit, Unavailable
from corral.events import log as event_log
from corral.events.event import emit
from corral.ids import new_id
from corral.jobs.job import JobRow, enqueue


async def run_in_one_batch(database: Database, *units: Callable[[], Any]) -> list[Any]:
    """Queue the units while another one holds up the writer, and return their results or errors."""
    gate = threading.Event()
    held = asyncio.ensure_future(database.work(lambda: gate.wait(1)))
    await asyncio.sleep(0.05)
    running = [asyncio.ensure_future(database.work(unit)) for unit in units]
    await asyncio.sleep(0.05)
    gate.set()
    await held
    return await asyncio.gather(*running, return_exceptions=True)


def record_batch_sizes(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of units in each batch is added when its results are delivered."""
    sizes: list[int] = []
    deliver = database.deliver

    def recording(ended: list[QueuedUnit]) -> None:
        sizes.append(len(ended))
        deliver(ended)

    monkeypatch.setattr(database, "deliver", recording)
    return sizes


async def test_unit_of_work_1_a_read_unit_refuses_writes(database: Database) -> None:
    with pytest.raises(peewee.DatabaseError):
        await database.work(lambda: Note.create(key="a"), read=True)
    assert keys(database) == set()


def test_unit_of_work_3_outside_a_unit_is_no_unit(database: Database) -> None:
    with pytest.raises(NoUnit):
        Note.create(key="a")
    with pytest.raises(NoUnit):
        emit(Noted(key="a"), object=("note", "a"))
    with pytest.raises(NoUnit):
        enqueue("some.job")


async def test_unit_of_work_3_a_unit_in_a_unit_is_nested(database: Database) -> None:
    def outer() -> None:
        database.run(lambda: None)

    with pytest.raises(NestedUnit):
        await database.work(outer)


async def test_unit_of_work_5_a_failing_unit_is_rolled_back_alone(database: Database) -> None:
    def bad(index: int) -> None:
        note(f"bad{index}")
        raise Conflict("no")

    results = await asyncio.gather(
        *[database.work(partial(note, f"good{i}")) for i in range(20)],
        *[database.work(partial(bad, i)) for i in range(20)],
        return_exceptions=True,
    )
    assert sum(isinstance(result, Conflict) for result in results) == 20
    assert keys(database) == {f"good{i}" for i in range(20)}
    assert {record.object_id for record in events(database)} == {f"good{i}" for i in range(20)}


@pytest.mark.parametrize(("configured", "level"), [("full", 2), ("normal", 1)])
@pytest.mark.one_engine
async def test_unit_of_work_5_a_unit_need_not_wait_for_the_disk(tmp_path: Any, configured: str, level: int) -> None:
    """SQLite's level of synchronisation is 2 for FULL and 1 for NORMAL."""
    database, proceed = SqliteDatabase(str(tmp_path / "a.db"), synchronous=configured), threading.Event()
    relaxed = UnitContext(durable=False)

    def level_of_unit() -> int:
        return int(current().connection.execute("PRAGMA synchronous").fetchone()[0])

    async def levels(*entries: UnitContext) -> list[int]:
        """Run one unit each, all of them in the queue when the first one runs."""
        first = asyncio.ensure_future(database.work(proceed.wait, entry=entries[0]))
        units = [asyncio.ensure_future(database.work(level_of_unit, entry=entry)) for entry in entries]
        await asyncio.sleep(0)
        proceed.set()
        await first
        return await asyncio.gather(*units)

    try:
        await database.work(lambda: current().database.engine.create_tables([Note]))
        assert await levels(relaxed, relaxed) == [1, 1]
        assert await levels(relaxed, UnitContext(), relaxed) == [1, level, level]
        assert await levels(UnitContext(), relaxed) == [level, level]
        await database.work(lambda: Note.create(key="a"), entry=relaxed)
        with sqlite3.connect(tmp_path / "a.db") as other:
            assert other.execute("SELECT key FROM notes").fetchall() == [("a",)]
    finally:
        database.close()


async def test_unit_of_work_5_an_answer_comes_after_commit(
    database: Database, open_database: Callable[[], Database]
) -> None:
    other = open_database()
    for index in range(30):
        await database.work(partial(note, f"n{index}"))
        assert f"n{index}" in keys(other)


@SQLITE
async def test_unit_of_work_5_waiting_units_share_a_commit(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, sizes = threading.Event(), record_batch_sizes(database, monkeypatch)
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", 60.0)  # a busy machine may not run all of them in 10 ms
    first = asyncio.ensure_future(database.work(lambda: gate.wait(1)))
    await asyncio.sleep(0.05)
    others = [asyncio.ensure_future(database.work(partial(note, f"n{i}"))) for i in range(40)]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(first, *others)
    assert len(sizes) <= 2  # the first unit may be alone
    assert len(keys(database)) == 40


@SQLITE
async def test_unit_of_work_5_units_share_a_transaction_and_have_savepoints_only_after_a_failure(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that fails before it writes leaves nothing to undo. After any other failure, the units run again."""
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", 60.0)  # a busy machine may not run all of them in 10 ms
    await database.work(lambda: note("before"))
    statements: list[str] = []
    writer: Any = database.pools[0].threads[0]
    assert len(database.pools[0].threads) == 1
    writer.connection.set_trace_callback(statements.append)

    runs: Counter[str] = Counter()

    def unit(name: str, fails: str = "") -> None:
        runs[name] += 1
        if fails == "early":
            raise Conflict("no")
        note(f"{name} {new_id()}")
        if fails == "late" or (fails == "late in its second run" and runs[name] == 2):
            raise Conflict("no")

    async def transactions_of(**units: str) -> list[str]:
        """Run these units in one batch, and return the statements about transactions."""
        statements.clear()
        runs.clear()
        results = await run_in_one_batch(
            database, *[lambda name=name, fails=fails: unit(name, fails) for name, fails in units.items()]
        )
        assert [isinstance(result, Conflict) for result in results] == [bool(fails) for fails in units.values()]
        assert len(keys(database)) == len({key.split()[0] for key in keys(database)})
        assert not {name for name, fails in units.items() if fails} & {key.split()[0] for key in keys(database)}
        await database.work(lambda: Note.delete().execute())
        return [each for each in statements if not each.startswith(("INSERT", "SELECT", "DELETE", "--"))][:-4]

    checked = ["SAVEPOINT unit", "RELEASE unit"]  # whether a statement is still open
    shared = ["BEGIN IMMEDIATE", *checked, "COMMIT"]
    found = await transactions_of(first="", failing="early", last="")
    assert found == ["BEGIN IMMEDIATE", *checked, *checked, "COMMIT"]
    assert runs == {"first": 1, "failing": 1, "last": 1}
    # The first unit of the batch has held up the others. It runs again as well.
    rolled_back = ["BEGIN IMMEDIATE", "ROLLBACK", *checked, *shared]
    separate = ["BEGIN IMMEDIATE", *checked, *checked]
    undone = ["SAVEPOINT unit", "ROLLBACK TO unit", "RELEASE unit"]
    found = await transactions_of(first="", failing="late", last="")
    assert found == [*rolled_back, *separate, *undone, "COMMIT"]
    assert runs == {"first": 2, "failing": 2, "last": 1}
    found = await transactions_of(first="", second="late in its second run", failing="late", last="")
    assert found == [*rolled_back, *separate, *undone, *undone, "COMMIT"]
    assert runs == {"first": 2, "second": 2, "failing": 2, "last": 1}


@SQLITE
async def test_unit_of_work_9_units_of_a_transaction_share_the_writes_they_have_collected_for(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", 60.0)
    written: list[list[str]] = []

    def write(items: list[str]) -> None:
        if "bad" in items:
            raise ValueError("bad")
        written.append(items)
        Note.insert_many([{"key": item} for item in items]).execute()

    def unit(item: str, error: Exception | None = None) -> None:
        collect(write, item)
        with contextlib.suppress(Conflict), savepoint():
            collect(write, "discarded")
            raise Conflict("undone")
        if error is not None:
            raise error

    def sees_jobs_only() -> None:  # of the units before it in the transaction
        seen.append((JobRow.select().count(), event_log.EventRow.select().count()))

    seen: list[tuple[int, int]] = []
    await run_in_one_batch(database, lambda: (note("x"), enqueue("some.job")), sees_jobs_only)
    assert seen == [(1, 0)]
    await database.work(lambda: Note.delete().execute())
    await run_in_one_batch(database, lambda: unit("a"), lambda: unit("b", Conflict("no")), lambda: unit("c"))
    assert written == [["a", "c"]]
    written.clear()
    results = await run_in_one_batch(database, lambda: unit("d"), lambda: unit("bad"), lambda: unit("e"))
    assert [type(result) for result in results] == [type(None), ValueError, type(None)]
    assert (written, keys(database)) == ([["d"], ["e"]], {"a", "c", "d", "e"})


@SQLITE
@pytest.mark.parametrize(
    ("units", "seconds", "batch_seconds", "largest"), [(150, 0.0, 60.0, 64), (40, 0.004, 0.010, 3)]
)
async def test_unit_of_work_5_a_batch_is_at_most_64_units_or_10_ms(
    database: SqliteDatabase,
    monkeypatch: pytest.MonkeyPatch,
    units: int,
    seconds: float,
    batch_seconds: float,
    largest: int,
) -> None:
    assert (sqlite.BATCH_UNITS, sqlite.BATCH_SECONDS) == (64, 0.010)
    sizes = record_batch_sizes(database, monkeypatch)
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", batch_seconds)
    gate = threading.Event()

    def note_slowly(key: str) -> None:
        time.sleep(seconds)
        note(key)

    first = asyncio.ensure_future(database.work(lambda: gate.wait(1)))
    await asyncio.sleep(0.05)
    others = [asyncio.ensure_future(database.work(partial(note_slowly, f"n{i}"))) for i in range(units)]
    await asyncio.sleep(0.05)
    gate.set()
    await asyncio.gather(first, *others)
    assert sum(sizes) == units + 1
    assert max(sizes) <= largest


@SQLITE
async def test_unit_of_work_5_units_are_queued_together_if_as_many_arrive_as_shared_the_last_commit(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", 60.0)
    sizes = record_batch_sizes(database, monkeypatch)
    database.last_batch, running = 8, []
    for index in range(8):
        running.append(asyncio.ensure_future(database.work(partial(note, f"n{index}"))))
        await asyncio.sleep(0)  # each arrives in another iteration of the event loop
    await asyncio.gather(*running)
    assert sizes == [8]
    await asyncio.wait_for(database.work(lambda: note("alone")), 5)  # no other arrives, so this one does not wait
    assert sizes == [8, 1]
    assert len(keys(database)) == 9


@SQLITE
async def test_unit_of_work_5_a_unit_waits_at_most_10_ms_for_units_that_keep_arriving(
    database: SqliteDatabase,
) -> None:
    def other_work() -> None:
        time.sleep(0.012)

    database.last_batch, running = 64, []
    for _ in range(3):
        running.append(asyncio.ensure_future(database.work(lambda: note(new_id()))))
        await asyncio.sleep(0)
        other_work()  # in each iteration of the event loop
    assert len(database._arrived) < 3
    await asyncio.gather(*running)


@SQLITE
async def test_unit_of_work_5_a_unit_does_not_wait_for_others_after_a_small_batch(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.last_batch = sqlite.SMALL_BATCH
    written = asyncio.ensure_future(database.work(lambda: note("a")))
    await asyncio.sleep(0)  # the unit is submitted
    until = time.monotonic() + 5
    while not keys(database):  # without another iteration of the event loop
        assert time.monotonic() < until
    await written


@SQLITE
async def test_unit_of_work_5_a_unit_is_queued_at_once_while_others_are_queued(database: SqliteDatabase) -> None:
    gate, waiting = threading.Event(), database.pools[0].queue
    held = asyncio.ensure_future(database.work(lambda: gate.wait(1)))
    await asyncio.sleep(0.05)
    others = [asyncio.ensure_future(database.work(lambda: note("a")))]
    await asyncio.sleep(0)
    assert waiting.qsize() == 1
    database.last_batch = 8
    others.append(asyncio.ensure_future(database.work(lambda: note("b"))))
    await asyncio.sleep(0)
    assert waiting.qsize() == 2
    gate.set()
    await asyncio.gather(held, *others)


@SQLITE
async def test_unit_of_work_5_a_unit_that_waits_for_others_while_the_database_closes_is_answered(
    database: SqliteDatabase,
) -> None:
    database.last_batch = 8
    waiting = asyncio.ensure_future(database.work(lambda: note("late")))
    await asyncio.sleep(0)
    database.close()
    with pytest.raises(Unavailable, match="closed"):
        await asyncio.wait_for(waiting, 5)


@SQLITE
def test_unit_of_work_5_a_unit_of_an_event_loop_that_has_ended_holds_up_no_other(database: SqliteDatabase) -> None:
    database.last_batch = 8
    ended = asyncio.new_event_loop()
    ended.set_exception_handler(lambda *_: None)  # it would print that the task never ended
    left_behind = ended.create_task(database.work(lambda: note("left behind")))
    ended.call_soon(ended.stop)
    ended.run_forever()
    ended.close()
    assert database._arrived
    asyncio.run(asyncio.wait_for(database.work(lambda: note("next")), 5))
    assert keys(database) == {"left behind", "next"}
    assert not left_behind.done()


@SQLITE
async def test_unit_of_work_5_a_full_queue_is_overloaded(database: SqliteDatabase) -> None:
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


@SQLITE
async def test_unit_of_work_6_when_sqlite_ends_the_transaction_the_innocent_run_again(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What disk full and I/O errors do: SQLite rolls back by itself, in the middle of a batch."""
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", 60.0)  # a busy machine may not run all of them in 10 ms
    broken: list[bool] = []

    def breaks() -> str:
        Note.create(key="culprit")
        if not broken:
            broken.append(True)
            current().connection.execute("ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")
        return "second try"

    before, after = ([lambda name=f"{name}{i}": note(name) for i in range(5)] for name in "nm")
    results = await run_in_one_batch(database, *before, breaks, *after)
    assert results == [*(f"n{i}" for i in range(5)), "second try", *(f"m{i}" for i in range(5))]
    assert keys(database) == {f"n{i}" for i in range(5)} | {f"m{i}" for i in range(5)} | {"culprit"}
    assert len(events(database)) == 10


@SQLITE
@pytest.mark.parametrize("kept", [False, True])
async def test_unit_of_work_6_a_statement_that_a_unit_leaves_open_is_the_fault_of_this_unit(
    database: SqliteDatabase, kept: bool
) -> None:
    """The rows of an INSERT with RETURNING that nobody has read; a plugin may even keep them after the unit."""
    gate, open_ones = threading.Event(), []

    def leaves_open() -> Any:
        cursor = Note.insert_many([{"key": f"open{i}"} for i in range(300)]).execute()
        open_ones.append(cursor if kept else None)
        return cursor

    held = asyncio.ensure_future(database.work(lambda: gate.wait(1)))
    await asyncio.sleep(0.05)
    before = [asyncio.ensure_future(database.work(partial(note, f"n{i}"))) for i in range(5)]
    culprit = asyncio.ensure_future(database.work(leaves_open))
    after = [asyncio.ensure_future(database.work(partial(note, f"m{i}"))) for i in range(5)]
    await asyncio.sleep(0.05)
    gate.set()
    async with asyncio.timeout(60):
        await asyncio.gather(held, *before, *after)
        with pytest.raises(Unavailable):
            await culprit
        await database.work(lambda: note("later"))
    assert keys(database) == {f"{name}{i}" for name in "nm" for i in range(5)} | {"later"}


@SQLITE
async def test_a_read_that_is_interrupted_as_it_begins_leaves_no_transaction_open(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "STEPS", 1)
    with monkeypatch.context() as late:
        late.setattr(sqlite, "STEP_BUDGET_SECONDS", -1.0)  # as if the process had been suspended before BEGIN
        assert await database.read(lambda: Note.select().count(), UnitContext()) == 0
    assert database.read_now(lambda: Note.select().count(), UnitContext()) == 0


@SQLITE
async def test_unit_of_work_6_a_unit_that_catches_the_end_of_its_transaction_fails_alone(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", 60.0)

    def catches() -> None:
        note("undone")
        with contextlib.suppress(sqlite3.IntegrityError), savepoint():
            current().connection.execute("INSERT OR ROLLBACK INTO notes (key, value) VALUES ('undone', 1)")

    results = await run_in_one_batch(database, lambda: note("before"), catches, lambda: note("after"))
    assert (results[0], results[2]) == ("before", "after")
    with pytest.raises(RuntimeError, match="had ended the transaction"):
        raise results[1]
    assert keys(database) == {"before", "after"}
    assert sorted(event.object_id for event in events(database)) == sorted(keys(database))


@SQLITE
@pytest.mark.parametrize("blocks", [False, True], ids=["raises", "blocks"])
async def test_unit_of_work_7_shared_writes_that_do_not_end_are_the_fault_of_one_unit(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    monkeypatch.setattr(sqlite, "BATCH_SECONDS", 60.0)
    monkeypatch.setattr(pool, "LOST_AFTER", 0.5)

    def write(items: list[str]) -> None:
        until = time.monotonic() + 10
        while blocks and time.monotonic() < until:
            time.sleep(0.01)
        raise asyncio.CancelledError

    async with asyncio.timeout(8):
        results = await run_in_one_batch(database, lambda: note("innocent"), lambda: collect(write, "bad"))
        await database.work(lambda: note("later"))
    assert (results[0], type(results[1])) == ("innocent", Unavailable if blocks else asyncio.CancelledError)
    assert keys(database) == {"innocent", "later"}


@SQLITE
async def test_unit_of_work_6_a_failed_commit_answers_every_member(database: SqliteDatabase) -> None:
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
    writer: Any = database.pools[0].threads[0]
    writer.connection = Full(writer.connection)
    results = await asyncio.gather(*[database.work(partial(note, f"n{i}")) for i in range(5)], return_exceptions=True)
    assert [getattr(result, "code", None) for result in results] == ["storage_full"] * 5
    writer.connection = writer.connection.real
    await database.work(lambda: note("later"))
    assert keys(database) == {"before", "later"}


async def test_unit_of_work_9_audit_jobs_and_events_are_written_last_in_this_order(database: Database) -> None:
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


async def test_unit_of_work_10_a_later_number_never_appears_before_an_earlier_one(
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
            for record in other.run(partial(event_log.read, cursor), read=True):
                seen.append(record.object_id)
                cursor = record.seq
            if last_round:
                return

    def write(source: Database, name: str) -> None:
        for index in range(100):
            source.run(partial(note, f"{name}{index}"))

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


async def test_unit_of_work_11_after_commit_runs_once_on_the_loop_and_not_after_a_failure(database: Database) -> None:
    database.deliver_on(asyncio.get_running_loop())
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


async def test_unit_of_work_11_stop_iteration_is_an_answer_too(database: Database) -> None:
    """No future can be given it: those that share the COMMIT with such a unit would wait for ever."""

    def ends() -> None:
        next(iter([]))

    others = [database.work(partial(note, f"n{i}")) for i in range(5)]
    async with asyncio.timeout(60):
        ended, *told = await asyncio.gather(database.work(ends), *others, return_exceptions=True)
    assert isinstance(ended, RuntimeError)
    assert isinstance(ended.__cause__, StopIteration)
    assert told == [f"n{i}" for i in range(5)]
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(database.run, ends, read=True)


async def test_unit_of_work_15_what_an_answer_told_is_visible_to_the_next_read(
    database: Database, open_database: Callable[[], Database]
) -> None:
    other = open_database()

    def write(value: int) -> None:
        row = Note.insert(key="k", value=value)
        if database.kind == "sqlite":
            row.on_conflict_replace().execute()
        else:
            row.on_conflict(conflict_target=[Note.key], update={"value": value}).execute()

    for value in range(50):
        await database.work(partial(write, value))
        assert other.run(lambda: Note.get_by_id("k").value, read=True) == value
        assert await database.work(lambda: Note.get_by_id("k").value, read=True) == value


@SQLITE
async def test_t14_two_processes_writing_meet_no_lock_error(
    database: Database, open_database: Callable[[], Database]
) -> None:
    others = [open_database() for _ in range(3)]

    def write(source: Database, name: str) -> None:
        for index in range(60):
            source.run(partial(note, f"{name}-{index}"))

    threads = [threading.Thread(target=write, args=(source, str(i))) for i, source in enumerate((database, *others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys(database)) == 240


def test_a_unit_that_is_submitted_while_the_database_closes_is_answered(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = threading.Thread(target=database.close)
    submit = database.pools[0].submit

    def submit_late(queued: QueuedUnit) -> None:
        closing.start()
        closing.join(0.5)  # it must wait for the unit; otherwise it has ended by now
        submit(queued)

    monkeypatch.setattr(database.pools[0], "submit", submit_late)
    answered = threading.Thread(target=database.run, args=(lambda: note("late"),), daemon=True)
    answered.start()
    answered.join(60)
    assert not answered.is_alive()
    closing.join(60)
    with pytest.raises(Unavailable) as refused:
        database.run(lambda: note("too late"))
    assert refused.value.code == "shutting_down"


def test_a_database_that_closes_finishes_the_units_that_wait_for_a_share_of_the_threads(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "LOST_AFTER", 60.0)
    entry, proceed = UnitContext(label="route of a plugin"), threading.Event()
    done: list[int] = []
    database.plugin_by_label[entry.label] = "a plugin"

    def read() -> None:
        proceed.wait(60)
        done.append(1)

    units = [threading.Thread(target=lambda: database.run(read, entry=entry, read=True), daemon=True) for _ in range(5)]
    for unit in units:
        unit.start()
    until = time.monotonic() + 60
    while database.pools[-1]._shares.waiting("a plugin") < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    closing = threading.Thread(target=database.close)
    closing.start()
    proceed.set()
    for thread in [*units, closing]:
        thread.join(60)
        assert not thread.is_alive()
    assert len(done) == 5
