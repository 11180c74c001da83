"""Exports: what they hold, and 6 of "Done when"."""

from __future__ import annotations

import csv
import io
import json
import resource
import sqlite3
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.plugins.audit.conftest import Books

from corral_plugins.audit.service import chain
from corral_plugins.audit.service.export import LogExport, escape_cell, unescape_cell
from corral_plugins.audit.service.signing import ExternalCheckpoints
from corral_plugins.audit.service.verify import verify_export
from corral_plugins.audit.shapes import ExportQuery

SHORT, LONG = 60_000, 1_000_000


async def test_audit_6_a_large_export_streams_and_verifies_offline(
    books: Books, long_form: bool, tmp_path: Path
) -> None:
    """The full form has 1 000 000 rows."""
    total = LONG if long_form else SHORT
    last = await _fill(books, total)
    path = tmp_path / "log.jsonl"
    query = ExportQuery()
    before = most = _memory_mib()
    began = time.monotonic()
    with path.open("wb") as file:
        async for chunk in LogExport(books.kit.kernel.database.work, query).chunks():
            file.write(chunk)
            most = max(most, _memory_mib())
    grown, took = most - before, time.monotonic() - began
    print(f"{last} rows, {path.stat().st_size / 2**20:.0f} MiB in {took:.1f} s with {grown:.1f} MiB more memory")
    assert grown < 64
    verdict = verify_export(path, ExternalCheckpoints(), sparse=False)
    assert (verdict.ok, verdict.checked) == (True, last), verdict


@pytest.mark.one_engine
async def test_a_hundred_thousand_rows_verify_in_ten_seconds(books: Books, long_form: bool) -> None:
    """The short form has a fifth of the rows, and more than a fifth of the time."""
    last = await _fill(books, 100_000 if long_form else 20_000)
    watch = time.monotonic if long_form else time.process_time  # other tests share the machine: count the work
    began = watch()
    verdict = await books.verify()
    took = watch() - began
    print(f"{last} rows in {took:.2f} s")
    assert (verdict.ok, verdict.checked, verdict.complete) == (True, last, True), verdict
    assert took <= (10 if long_form else 5)


async def test_many_rows_removed_in_a_row_are_a_gap(books: Books) -> None:
    last = await _fill(books, 9_000)
    books.behind(f"DELETE FROM audit_rows WHERE seq > 100 AND seq <= {last - 100}")
    verdict = await books.verify()
    assert (verdict.first_bad_seq, verdict.reason) == (101, "gap"), verdict
    books.behind(f"DELETE FROM audit_rows WHERE seq > 100 AND seq <= {last}")
    verdict = await books.verify()
    assert (verdict.first_bad_seq, verdict.reason) == (101, "tail_truncated"), verdict


@pytest.mark.one_engine
async def test_exports_of_both_formats_verify_and_show_what_was_altered(books: Books, tmp_path: Path) -> None:
    await books.write(2, object_name="=1+1", details={"text": 'a "quoted"\nline, and ,commas,', "n": 1.5})
    await books.write(1, object_name="'=already quoted", object_id="-5")
    for form in ("jsonl", "csv"):
        answer = await books.auditor.get(f"/admin/audit/export?format={form}")
        assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
        assert answer.headers["content-disposition"].endswith(f'.{form}"')
        path = tmp_path / f"log.{form}"
        path.write_bytes(answer.body)
        verdict = verify_export(path, ExternalCheckpoints(), sparse=False)
        assert verdict.ok, (form, verdict)
        path.write_bytes(answer.body.replace(b"already quoted", b"already quotex"))
        altered = verify_export(path, ExternalCheckpoints(), sparse=False)
        assert (altered.ok, altered.reason) == (False, "hash_mismatch"), (form, altered)


async def test_no_cell_is_a_formula_and_every_cell_can_be_read_back(books: Books) -> None:
    hostile = ["=1+1", "+1", "-1", "@x", "\t=1", " =1", "\ufeff=1", "＝1", "'=1", "'", "plain", "a=1", "", "\r\n=1"]
    for text in hostile:
        made = escape_cell(text)
        assert unescape_cell(made) == text
        assert made.lstrip(" \ufeff\u200b")[:1] not in set("=+-@＝＋－＠\t\r\n"), text
    await books.write(1, object_name="=cmd|' /C calc'!A0")
    answer = await books.auditor.get("/admin/audit/export?format=csv&object_id=one")
    rows = list(csv.DictReader(io.StringIO(answer.body.decode("utf-8-sig"))))
    assert [row["object_name"] for row in rows] == ["'=cmd|' /C calc'!A0"]
    assert rows[0]["seq"].isdigit()


async def test_a_filtered_export_holds_what_the_list_shows(books: Books, tmp_path: Path) -> None:
    await books.write(3, action="test.other.change")
    await books.write(2)
    answer = await books.auditor.get("/admin/audit/export?action=test.thing.*")
    rows = [json.loads(line) for line in answer.body.splitlines()]
    assert [row["action"] for row in rows] == ["test.thing.change"] * 2
    assert [row["seq"] for row in rows] == [row["seq"] for row in await books.rows("&action=test.thing.change")]
    path = tmp_path / "part.jsonl"
    path.write_bytes(answer.body)
    assert verify_export(path, ExternalCheckpoints(), sparse=True).ok
    assert (await books.auditor.get("/admin/audit/export?format=xlsx")).code == "unsupported_format"


async def test_each_look_at_the_log_is_in_it(books: Books) -> None:
    await books.auditor.get("/admin/audit/export?action=auth.*")
    await books.auditor.get("/admin/audit/verify")
    await books.auditor.get("/admin/audit?outcome=denied")
    rows = await books.rows(f"&actor={books.auditor.user['id']}&action=audit.*")
    assert [row["action"] for row in rows] == ["audit.log.export", "audit.log.verify", "audit.log.read"]
    assert rows[0]["details"] == {"format": "jsonl", "filters": {"action": ["auth.*"]}}
    assert rows[1]["details"]["ok"] is True


async def _fill(books: Books, total: int) -> int:
    """Rows by the thousand, made as the log makes them, without its units."""
    from corral_plugins.audit.service import queries

    head = (await books.work(queries.chain_ends, read=True)).head
    made, before = [], head.hash
    sqlite = books.url.startswith("sqlite")
    engine: Any = sqlite3.connect(books.url.removeprefix("sqlite:///")) if sqlite else psycopg.connect(books.url)
    cursor = engine.cursor()
    for seq in range(head.seq + 1, head.seq + total + 1):
        values = [
            seq,
            f"01a2-{seq:031d}",
            "2026-01-01T00:00:00.000Z",
            "user",
            "01a216b0-0b93-771d-808d-9570a143f840",
            None,
            None,
            None,
            "192.0.2.1",
            "Mozilla/5.0",
            "test.thing.change",
            "thing",
            f"{seq}",
            None,
            "success",
            None,
            None,
            '[{"field":"a","from":1,"to":2}]',
            "{}",
            None,
            before,
        ]
        before = chain.build_row_without_hash(values).digest()
        made.append((*values, before))
        if len(made) == 5000 or seq == head.seq + total:
            _insert(cursor, made, sqlite=sqlite)
            made.clear()
    last: int = head.seq + total
    mark = "?" if sqlite else "%s"
    cursor.execute(f"UPDATE audit_head SET seq = {mark}, hash = {mark}", (last, before))
    engine.commit()
    engine.close()
    return last


def _insert(cursor: Any, rows: list[tuple[Any, ...]], *, sqlite: bool) -> None:
    columns = ", ".join(chain.COLUMNS)
    if sqlite:
        marks = ", ".join("?" * len(chain.COLUMNS))
        cursor.executemany(f"INSERT INTO audit_rows ({columns}) VALUES ({marks})", rows)
        return
    with cursor.copy(f"COPY audit_rows ({columns}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _memory_mib() -> float:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize() / 2**20
