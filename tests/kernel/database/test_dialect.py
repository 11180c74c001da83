"""Raw SQL, savepoints, locks and full text search behave alike on both engines."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import peewee
import pytest
from tests.kernel.database.conftest import Note

from corral import clock
from corral.database import dialect
from corral.database.engine import Database
from corral.database.full_text import FullTextIndex
from corral.database.unit import after_commit, current, locked
from corral.jobs.job import JobRow, enqueue

DAY = "2026-03-01T00:00:00.000Z"


def test_raw_sql_takes_parameters_and_percent_signs(database: Database) -> None:
    def run() -> Any:
        Note.create(key="50% off", value=7)
        sql = "SELECT value FROM notes WHERE key LIKE '50%' AND value = ?"
        part = dialect.sql_fragment("(SELECT key FROM notes WHERE value = ?)", [7])
        return dialect.execute(sql, [7]).fetchone()[0], Note.select().where(Note.key.in_(part)).count()

    assert database.run(run) == (7, 1)


def test_an_error_of_raw_sql_is_one_of_peewee(database: Database) -> None:
    def run() -> None:
        Note.create(key="once")
        dialect.execute("INSERT INTO notes (key, value) VALUES (?, 1)", ["once"])

    with pytest.raises(peewee.IntegrityError):
        database.run(run)


def test_a_savepoint_undoes_rows_and_what_the_unit_would_write_at_its_end(database: Database) -> None:
    called: list[str] = []

    def fail() -> None:
        with dialect.savepoint():
            enqueue("shelf.undone")
            Note.create(key="undone")
            after_commit(lambda: called.append("undone"))
            Note.create(key="kept")

    def run() -> None:
        enqueue("shelf.kept")
        Note.create(key="kept")
        after_commit(lambda: called.append("kept"))
        with pytest.raises(peewee.IntegrityError):
            fail()
        with dialect.savepoint():
            Note.create(key="kept too")

    database.run(run)
    assert called == ["kept"]
    assert database.run(lambda: [row.name for row in JobRow.select()]) == ["shelf.kept"]
    assert database.run(lambda: sorted(row.key for row in Note.select())) == ["kept", "kept too"]


def test_units_with_an_advisory_lock_follow_each_other(database: Database) -> None:
    def count() -> None:
        dialect.advisory_lock("notes")
        Note.create(key=str(Note.select().count()))

    threads = [threading.Thread(target=database.run, args=(count,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.run(lambda: Note.select().count()) == 8


def test_locked_rows_are_found_as_before(database: Database) -> None:
    def run() -> list[str]:
        Note.create(key="a")
        query = Note.select().where(Note.key == "a")
        queries = locked(query), locked(query, share=True), locked(query, skip_locked=True)
        return [row.key for each in queries for row in each]

    assert database.run(run) == ["a"] * 3


def test_times_in_sql(database: Database) -> None:
    until = clock.format_instant(clock.parse_instant(DAY) + 1.5)

    def run() -> tuple[Any, ...]:
        sql = f"SELECT {dialect.epoch_seconds('a')}, {dialect.milliseconds_between('a', 'b')}"
        row: tuple[Any, ...] = dialect.execute(
            f"{sql} FROM (SELECT CAST(? AS text) AS a, CAST(? AS text) AS b) AS t", [DAY, until]
        ).fetchone()
        return tuple(row)

    assert database.run(run) == (int(clock.parse_instant(DAY)), 1500)


def test_texts_of_a_json_array(database: Database) -> None:
    sql = "SELECT value FROM {} ORDER BY value"
    found = database.run(
        lambda: dialect.execute(sql.format(dialect.json_array_strings("q")), ['["b", "a"]']).fetchall()
    )
    assert [row[0] for row in found] == ["a", "b"]


def test_order_by_code_point(database: Database) -> None:
    def run() -> list[str]:
        for key in ("b", "a", "B", "_", "é"):
            Note.create(key=key)
        return [row.key for row in Note.select().order_by(dialect.by_code_point(Note.key))]

    assert database.run(run) == sorted(("b", "a", "B", "_", "é"))


def test_rows_of_an_append_only_table_stay(database: Database) -> None:
    def protect() -> None:
        engine = current().database.engine
        dialect.append_only(engine, "notes", unique=["key"], deletable="OLD.value < 2")

    database.run(protect)
    database.run(lambda: [Note.create(key=str(value), value=value) for value in (1, 2)])
    for attempt in (
        lambda: Note.update(value=0).execute(),
        lambda: Note.delete().execute(),
        lambda: (
            Note.insert(key="2", value=0).on_conflict_replace().execute()
            if dialect.on_sqlite()
            else dialect.execute("TRUNCATE notes")
        ),
    ):
        with pytest.raises(peewee.DatabaseError, match="notes"):
            database.run(attempt)
    database.run(lambda: Note.delete().where(Note.value < 2).execute())
    assert database.run(lambda: [row.value for row in Note.select()]) == [2]


def test_full_text_search(database: Database) -> None:
    index = FullTextIndex("note_words", "title", "text")
    add = "SELECT CAST(? AS bigint), CAST(? AS text), CAST(? AS text)"
    texts = {1: ("Fix the login", "It fails."), 2: ("Login page", "Größe in pixels"), 3: ("Other", "thing_login")}

    def found(*words: str, **options: Any) -> list[int]:
        query = index.query(words, enough=options.pop("enough", 100))
        parameters = [query, *options.values(), 10]
        return [row[0] for row in dialect.execute(index.match_sql(up_to="up_to" in options), parameters).fetchall()]

    def run() -> None:
        index.create(current().database.engine)
        for number, (title, text) in texts.items():
            index.add(add, [number, title, text])
        assert found("login") == [3, 2, 1]
        assert found("log", "fix") == [1]
        assert found("größ") == [2]
        assert found("login", up_to=2) == [2, 1]
        assert found("login", enough=3) == [3, 2, 1]
        assert index.count(index.query(["log"], enough=100), limit=2) == 2
        index.remove(2, texts[2])
        assert found("login") == [3, 1]
        index.add(add, [2, "New words", ""])
        assert found("words") == [2]

    database.run(run)


def test_the_segments_of_a_full_text_index_are_merged(database: Database) -> None:
    """Each search looks through all segments, so their number decides what a search costs in a large table."""
    index, add = FullTextIndex("merged_words", "text"), "SELECT CAST(? AS bigint), CAST(? AS text)"

    def segments() -> int:
        sql = "SELECT COUNT(DISTINCT segid) FROM merged_words_idx" if dialect.on_sqlite() else "SELECT 1"
        return int(dialect.execute(sql).fetchone()[0])

    database.run(lambda: index.create(current().database.engine))
    for number in range(7):
        database.run(partial(index.add, add, [number, f"word{number} again"]))
    before = database.run(segments)
    for _ in range(10):
        database.run(index.merge)
    assert database.run(segments) == 1 <= before
    assert before > 1 or not database.is_file
    assert database.run(lambda: index.count(index.query(["again"], enough=100), limit=10)) == 7
