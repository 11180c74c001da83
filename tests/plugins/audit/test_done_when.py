"""Done when, of the audit log: 1 to 5 here, 6 in `test_export.py`.

Waiting: the `audit.checkpoint_webhook` setting (with `webhooks`), the dataset `audit` (with `exports`), and rows of
approvals, webhooks, channels, budgets, breakers, dead letters, SSH and installs (with their plugins).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
from tests.plugins.audit.conftest import Books

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN
from corral.ids import new_id
from corral.plugin import AuditEntry
from corral_plugins.audit.service.chain import COLUMNS
from corral_plugins.audit.service.signing import ExternalCheckpoints
from corral_plugins.audit.service.verify import Verification

WRITERS, EACH = 50, 200


async def test_audit_1_fifty_writers_give_one_linear_chain(books: Books, long_form: bool) -> None:
    """On PostgreSQL, where each entry is a transaction, each writer of the short form writes a fifth of the entries."""
    is_whole = long_form or books.kit.kernel.database.kind == "sqlite"
    each, before = EACH if is_whole else EACH // 5, len(await books.rows())

    async def writer(number: int) -> None:
        for turn in range(each):
            changes = {"value": (turn, turn + 1)}
            entry = AuditEntry(action="test.thing.change", object_type="thing", object_id=f"{number}", changes=changes)
            await books.work(partial(books.log.record, entry))

    await asyncio.gather(*[writer(number) for number in range(WRITERS)])
    verdict = await books.verify()
    assert verdict.ok, verdict
    assert verdict.complete
    assert verdict.checked == verdict.head.seq >= before + WRITERS * each
    listed = (await books.admin.get("/admin/audit?limit=1&action=test.thing.change")).json()
    assert listed["total"] == WRITERS * each


async def test_audit_2_every_altered_column_is_found(books: Books) -> None:
    await books.write(8, code="c", object_name="n", changes={"a": (1, 2)}, details={"b": "c"})
    verdict = await books.verify()
    assert verdict.ok, verdict
    seq = verdict.head.seq - 3
    numbers = {"seq"}
    for column in COLUMNS:
        if column in numbers:
            continue
        old = await books.work(partial(_value, seq, column), read=True)
        wrong = {"hash": "f" * 64, "prev_hash": "e" * 64}.get(column, "altered")
        _set(books, column, wrong, seq)
        found = await books.verify()
        assert (found.ok, found.first_bad_seq, found.reason) == (False, seq, "hash_mismatch"), (column, found)
        _set(books, column, old, seq)
        assert (await books.verify()).ok, column
    _set(books, "user_agent", "", seq)  # nothing and an empty text are not the same
    assert (await books.verify()).first_bad_seq == seq


async def test_audit_2_rows_removed_swapped_moved_and_added_are_found(books: Books) -> None:
    await books.write(12)
    last = (await books.verify()).head.seq
    books.behind("CREATE TABLE kept AS SELECT * FROM audit_rows", "CREATE TABLE kept_head AS SELECT * FROM audit_head")

    async def expect(first_bad: int, *reasons: str) -> None:
        found = await books.verify()
        assert (found.ok, found.first_bad_seq) == (False, first_bad), found
        assert found.reason in reasons, found
        books.behind(
            "DELETE FROM audit_rows",
            "INSERT INTO audit_rows SELECT * FROM kept",
            "DELETE FROM audit_head",
            "INSERT INTO audit_head SELECT * FROM kept_head",
        )
        assert (await books.verify()).ok

    books.behind(f"DELETE FROM audit_rows WHERE seq = {last - 4}")
    await expect(last - 4, "gap")
    books.behind(f"DELETE FROM audit_rows WHERE seq <= {last - 4}")
    await expect(1, "gap")
    books.behind(
        f"UPDATE audit_rows SET seq = 1000000 WHERE seq = {last - 5}",
        f"UPDATE audit_rows SET seq = {last - 5} WHERE seq = {last - 4}",
        f"UPDATE audit_rows SET seq = {last - 4} WHERE seq = 1000000",
    )
    await expect(last - 5, "hash_mismatch")
    books.behind(f"UPDATE audit_rows SET seq = 1000000 WHERE seq = {last - 5}")
    await expect(last - 5, "gap")
    books.behind(f"DELETE FROM audit_rows WHERE seq > {last - 2}")
    await expect(last - 1, "tail_truncated")
    books.behind(
        f"INSERT INTO audit_rows SELECT {last + 1}, '{new_id()}', {', '.join(COLUMNS[2:-2])}, hash, hash FROM kept"
        f" WHERE seq = {last}"
    )
    await expect(last + 1, "hash_mismatch", "broken_link")
    books.behind(f"UPDATE audit_head SET anchor_seq = {last - 6}", f"DELETE FROM audit_rows WHERE seq <= {last - 6}")
    await expect(1, "gap")


async def test_audit_2_a_chain_that_was_computed_anew_breaks_at_a_checkpoint(books: Books) -> None:
    """Whoever alters a row and all hashes after it would be believed, were it not for what is signed."""
    await books.write(3)
    await books.sign()
    await books.write(2)
    signed = (await books.verify()).head.seq - 2
    await _forge(books, signed - 1)
    found = await books.verify()
    assert (found.ok, found.first_bad_seq, found.reason) == (False, signed, "checkpoint_mismatch"), found
    books.behind("UPDATE audit_checkpoints SET rows = rows + 1")
    assert (await books.verify()).reason == "bad_signature"


async def test_audit_3_a_cut_tail_is_found_by_kept_checkpoints(books: Books) -> None:
    await books.write(5)
    kept = await books.sign()
    key = (await books.auditor.get("/admin/audit/checkpoints")).json()["public_key"]
    cut = kept.seq - 2
    books.behind(
        f"DELETE FROM audit_rows WHERE seq > {cut}",
        f"DELETE FROM audit_checkpoints WHERE seq > {cut}",
        f"UPDATE audit_head SET seq = {cut}, hash = (SELECT hash FROM audit_rows WHERE seq = {cut})",
    )
    verification: Verification = books.service(Verification)
    alone = await verification.verify(None, None, ExternalCheckpoints(), seconds=25)
    assert alone.ok, "nothing in the database itself can tell"
    found = await verification.verify(None, None, ExternalCheckpoints([kept], [key]), seconds=25)
    assert (found.ok, found.first_bad_seq, found.reason) == (False, cut + 1, "tail_truncated"), found


async def test_audit_4_without_the_table_changes_are_refused_and_leave_nothing(
    make_kit: Callable[..., Any], database_url: str
) -> None:
    books = await Books(await make_kit(), database_url).build()
    member = (await books.kit.as_user("member")).user["id"]
    _refuse_inserts(books)
    new = {"email": "x@example.org", "full_name": "X", "password": "correct horse battery staple"}
    for method, path, body in (
        ("POST", "/admin/users", new),
        ("PATCH", f"/admin/users/{member}", {"role": "viewer"}),
        ("PUT", "/settings/audit/record_ip", {"value": False}),
        ("POST", "/plugins/realtime/disable", {}),
    ):
        answer = await books.admin.request(method, path, body)
        assert (answer.status, answer.code) == (503, "audit_unavailable"), (path, answer)
        assert "retry-after" in answer.headers
    users = (await books.admin.get("/admin/users")).json()
    assert users["total"] == 3
    assert {user["role"] for user in users["items"] if user["id"] == member} == {"member"}
    assert (await books.admin.get("/settings?category=audit")).json()["audit"]["record_ip"] is True
    assert (await books.admin.get("/plugins/realtime")).json()["state"] == "active"
    assert (await books.auditor.get("/admin/audit")).status == 200
    assert (await books.auditor.get("/admin/audit/verify")).json()["ok"] is True
    await books.log.report_failures()
    alerts = [event.payload() for event in await books.kit.events() if event.type == "system.alert"]
    assert [alert["kind"] for alert in alerts] == ["audit_write_failed"]
    assert (await books.admin.patch(f"/admin/users/{member}", {"role": "viewer"})).status == 503
    await books.log.report_failures()
    assert len([event for event in await books.kit.events() if event.type == "system.alert"]) == 1, (
        "an hour is not over"
    )
    _take_inserts(books)
    assert (await books.admin.patch(f"/admin/users/{member}", {"role": "viewer"})).status == 200
    assert (await books.verify()).ok


async def test_audit_5_an_auditor_reads_verifies_and_exports_and_nothing_else(
    make_kit: Callable[..., Any],
) -> None:
    kit = await make_kit()
    auditor = await kit.as_user("auditor")
    row = (await auditor.get("/admin/audit")).json()["items"][0]
    for path in ("", "/verify", "/export", "/export?format=csv", "/checkpoints", f"/{row['id']}"):
        assert (await auditor.get(f"/admin/audit{path}")).status == 200, path
    own = {PUBLIC, SIGNED_IN, ANY_CALLER, "audit.read", "audit.export"}
    others = [each.route for each in kit.application.endpoints if own.isdisjoint(each.route.needs)]
    assert len(others) > 100
    for route in others:
        path = route.path
        for name in route.path_parameters:
            path = path.replace(f"{{{name}}}", new_id() if name.endswith("id") else "name")
        answer = await auditor.request(route.method, path)
        assert (answer.status, answer.code) == (403, "forbidden"), (route.label, answer)


def _value(seq: int, column: str) -> Any:
    from corral_plugins.audit.models import AuditRow

    return AuditRow.select(getattr(AuditRow, column)).where(AuditRow.seq == seq).scalar()


def _set(books: Books, column: str, value: Any, seq: int) -> None:
    books.behind(f"UPDATE audit_rows SET {column} = ? WHERE seq = {seq}", parameters=(value,))


async def _forge(books: Books, seq: int) -> None:
    """Alter a row and compute the chain anew from there."""
    from corral_plugins.audit.service import chain, queries

    rows = await books.work(lambda: queries.rows_between(seq - 1, 2**62), read=True)
    books.behind(f"DELETE FROM audit_rows WHERE seq >= {seq}")
    before = rows[0][-2]
    marks = ", ".join("?" for _ in COLUMNS)
    for row in rows:
        values = dict(zip(COLUMNS, row, strict=True))
        values |= {"object_id": "another"} if values["seq"] == seq else {}
        values["prev_hash"] = before
        values["hash"] = before = chain.build_row_without_hash([values[name] for name in COLUMNS[:-1]]).digest()
        insert = f"INSERT INTO audit_rows ({', '.join(COLUMNS)}) VALUES ({marks})"
        books.behind(insert, parameters=[values[name] for name in COLUMNS])
    books.behind("UPDATE audit_head SET hash = ?", parameters=(before,))


def _refuse_inserts(books: Books) -> None:
    if books.url.startswith("sqlite"):
        with sqlite3.connect(books.url.removeprefix("sqlite:///"), timeout=10) as engine:
            engine.execute("CREATE TRIGGER no_insert BEFORE INSERT ON audit_rows BEGIN SELECT RAISE(ABORT, 'no'); END")
        engine.close()
        return
    with psycopg.connect(books.url) as connection:
        connection.execute(
            "CREATE TRIGGER no_insert BEFORE INSERT ON audit_rows FOR EACH ROW EXECUTE FUNCTION audit_rows_refuse()"
        )


def _take_inserts(books: Books) -> None:
    on = "" if books.url.startswith("sqlite") else " ON audit_rows"
    books.behind(f"DROP TRIGGER no_insert{on}")
