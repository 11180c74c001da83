"""What is recorded of whom, what is kept of it, and how it is found again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from tests.plugins.audit.conftest import Books

from corral import clock
from corral.database.unit import ANONYMOUS, Actor, UnitContext
from corral.errors import Conflict, Unavailable
from corral.plugin import SECRET_CHANGE, AuditEntry
from corral.redact.redactor import Redactor
from corral_plugins.audit.service import chain, queries
from corral_plugins.audit.service.chain import GENESIS, PREFIX
from corral_plugins.audit.settings import RECORD_IP, RETENTION_DAYS, VERBOSE

SECRET = "tr0ub4dor-and-3-more-words"


async def test_the_hash_is_of_canonical_json(books: Books) -> None:
    """Computed here as the page says it, without the product's own code."""
    await books.write(2, changes={"b": (None, {"z": 1, "a": "é/\n"})}, details={"y": True, "x": [1.5, None]})
    await books.write(1, object_name="\x7f☃", code="some.code", outcome="failed")
    before = GENESIS
    for row in await books.rows():
        given = row.pop("hash")
        encoded = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert hashlib.sha256(PREFIX + encoded).hexdigest() == given
        assert row["prev_hash"] == before
        before = given


async def test_a_row_tells_who_did_what_from_where(books: Books) -> None:
    member = await books.kit.as_user("member")
    headers = {"user-agent": "curl/8", "x-request-id": "request-1"}
    answer = await books.admin.patch(f"/admin/users/{member.user['id']}", {"role": "viewer"}, headers=headers)
    assert answer.status == 200
    (row,) = await books.rows("&request_id=request-1&action=admin.user.*")
    session = (await books.admin.get("/auth/me")).json()["session"]["id"]
    assert row["actor"] == {
        "type": "user",
        "id": books.admin.user["id"],
        "on_behalf_of": None,
        "session_id": session,
        "key_id": None,
        "ip": "127.0.0.1",
        "user_agent": "curl/8",
    }
    assert row["object"]["id"] == member.user["id"]
    assert {"field": "role", "from": "member", "to": "viewer"} in row["changes"]
    assert (row["outcome"], row["code"], row["truncated"]) == ("success", None, False)
    assert (await books.admin.get(f"/admin/audit/{row['id']}")).json() == row
    assert (await books.admin.get("/admin/audit/01a216b0-0b93-771d-808d-9570a143f840")).status == 404


async def test_rows_commit_with_the_change_or_not_at_all(books: Books) -> None:
    before = await books.work(queries.chain_ends, read=True)

    def fails() -> None:
        books.log.record(AuditEntry(action="test.thing.change", object_type="thing", object_id="x"))
        raise Conflict("no")

    with pytest.raises(Conflict):
        await books.work(fails)
    assert await books.work(queries.chain_ends, read=True) == before
    assert await books.rows("&action=test.*") == []
    assert (await books.verify()).ok


@pytest.mark.one_engine
async def test_no_secret_reaches_a_row(books: Books) -> None:
    books.service(Redactor).set_values("vault", {"one": SECRET})
    fields = {"changes": {"a": (f"x {SECRET}", 1), "password": SECRET_CHANGE}, "details": {"deep": [{"b": SECRET}]}}
    await books.write(1, object_name=f"name {SECRET}", **fields)
    entry = UnitContext("test", Actor("user", "u"), (), None, "192.0.2.7", f"agent {SECRET}")
    told = AuditEntry(action="test.thing.change", object_type="thing", object_id=SECRET)
    await books.work(lambda: books.log.record(told), entry=entry)
    rows = await books.rows("&action=test.*")
    assert SECRET not in json.dumps(rows)
    assert {"field": "password", "from": None, "to": "changed"} in rows[0]["changes"]
    assert "[redacted]" in rows[1]["actor"]["user_agent"]


@pytest.mark.one_engine
async def test_too_large_changes_are_told_by_their_hash(books: Books) -> None:
    await books.write(1, changes={"text": ("a" * 20_000, "b")}, details={"small": 1})
    (row,) = await books.rows("&action=test.*")
    assert (row["truncated"], row["changes"], row["details"]) == (True, [], {"small": 1})
    whole = b'[[{"field":"text","from":"' + b"a" * 20_000 + b'","to":"b"}],{"small":1}]'
    assert row["sha256"] == hashlib.sha256(whole).hexdigest()
    assert (await books.verify()).ok


async def test_whatever_is_given_can_be_kept(books: Books) -> None:
    """Half characters, NUL, shapes, instants, keys that are no texts: a change is not refused for them."""

    class Shape(msgspec.Struct):
        at: datetime
        n: int = 1

    odd: dict[str, Any] = {"half": "\ud800x", "shape": Shape(datetime(2026, 1, 1, tzinfo=UTC)), "keys": {1: 2}}
    await books.write(1, object_id="a\0b\ud800", object_name="n" * 500, details=odd, changes={"s": ({1, 2}, b"x")})
    (row,) = await books.rows("&action=test.*")
    assert row["details"]["half"] == "?x"
    assert row["details"]["keys"] == {"1": 2}
    assert len(row["object"]["name"]) == 300
    assert (await books.verify()).ok


async def test_filters_of_the_list(books: Books) -> None:
    first, second = (
        UnitContext("test", Actor("user", "anna", session_id="s")),
        UnitContext("test", Actor("agent", "bot", "anna")),
    )

    async def write(by: UnitContext, action: str, **given: Any) -> None:
        fields = {"object_type": "thing", "object_id": "t1", **given}
        await books.work(lambda: books.log.record(AuditEntry(action=action, **fields)), entry=by)

    await write(first, "alpha.thing.create")
    await write(second, "alpha.thing.delete", object_id="t2")
    await write(first, "alphabet.thing.create", object_type="other", outcome="failed", code="x")
    await write(first, "beta.thing.create", outcome="denied", code="forbidden")

    async def found(query: str) -> list[str]:
        return [row["action"] for row in await books.rows(f"&object_id=t1&object_id=t2{query}")]

    assert await found("&actor=anna") == [
        "alpha.thing.create",
        "alpha.thing.delete",
        "alphabet.thing.create",
        "beta.thing.create",
    ]
    assert await found("&actor=bot") == ["alpha.thing.delete"]
    assert await found("&action=alpha.*") == ["alpha.thing.create", "alpha.thing.delete"]
    assert await found("&action=alpha.*&action=beta.thing.create") == [
        "alpha.thing.create",
        "alpha.thing.delete",
        "beta.thing.create",
    ]
    assert await found("&action=nothing.*") == []
    assert await found("&object_type=other") == ["alphabet.thing.create"]
    assert await found("&outcome=failed&outcome=denied") == ["alphabet.thing.create", "beta.thing.create"]
    last = (await books.rows("&object_id=t1"))[-1]["ts"]
    assert len(await found(f"&until={last}")) == 4
    assert await found("&since=2999-01-01T00:00:00Z") == []
    for wrong in ("outcome=no", "since=yesterday", "nonsense=1", "limit=0"):
        assert (await books.auditor.get(f"/admin/audit?{wrong}")).status == 422


async def test_pages_go_deep_and_never_overlap(books: Books) -> None:
    await books.write(25)
    seen, cursor = [], ""
    while True:
        page = (await books.auditor.get(f"/admin/audit?limit=7&action=test.*{cursor}")).json()
        seen += [row["seq"] for row in page["items"]]
        assert page["total"] == 25
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
        await books.write(1, action="other.thing.change")
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 25


@pytest.mark.one_engine
async def test_a_flood_of_one_denial_is_one_row_and_a_count(books: Books) -> None:
    member = await books.kit.as_user("member")
    for _ in range(5):
        assert (await member.get("/admin/users")).status == 403
    assert (await member.post("/admin/users", {})).status == 403
    rows = await books.rows(f"&outcome=denied&actor={member.user['id']}")
    assert [(row["action"], row["object"]["id"], row["code"]) for row in rows] == [
        ("admin.request.read", "GET /admin/users", "forbidden"),
        ("admin.request.write", "POST /admin/users", "forbidden"),
    ]
    clock.travel(61)
    await books.log.write_repetitions()
    rows = await books.rows(f"&outcome=denied&actor={member.user['id']}")
    assert [row["details"].get("count") for row in rows] == [None, None, 4]
    assert rows[2]["actor"] == rows[0]["actor"]


async def test_a_flood_that_goes_on_is_counted_until_its_sum_is_written(books: Books) -> None:
    denied = AuditEntry(action="test.gate.refuse", object_type="gate", object_id="1", outcome="denied", code="x")

    async def counts(records: int) -> list[int | None]:
        for _ in range(records):
            await books.work(lambda: books.log.record(denied))
        return [row["details"].get("count") for row in await books.rows("&action=test.gate.refuse")]

    assert await counts(3) == [None]
    clock.travel(61)
    assert await counts(4) == [None], "nobody has written the sum of the minute yet"
    await books.log.write_repetitions()
    assert await counts(3) == [None, 6, None]
    clock.travel(61)
    await books.log.write_repetitions()
    clock.travel(61)
    assert await counts(1) == [None, 6, None, 2, None]
    clock.travel(61)
    assert await counts(2) == [None, 6, None, 2, None, None], "one alone needs no sum"


@pytest.mark.one_engine
async def test_of_callers_whom_nobody_knows_addresses_are_told_apart(books: Books) -> None:
    denied = AuditEntry(
        action="test.gate.refuse", object_type="gate", object_id="1", outcome="denied", code="ip_blocked"
    )
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1"):
        entry = UnitContext("gate", ANONYMOUS, client_ip=address)
        await books.work(lambda: books.log.record(denied), entry=entry)
    assert [row["actor"]["ip"] for row in await books.rows("&outcome=denied")] == ["192.0.2.1", "192.0.2.2"]


@pytest.mark.one_engine
async def test_a_count_that_cannot_be_written_is_kept(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = AuditEntry(action="test.gate.refuse", object_type="gate", object_id="1", outcome="denied", code="x")
    for _ in range(4):
        await books.work(lambda: books.log.record(denied))
    clock.travel(61)

    def fails(*given: Any) -> None:
        raise Unavailable("no", code="audit_unavailable")

    with monkeypatch.context() as broken:
        broken.setattr(books.log, "_append_row", fails)
        await books.log.write_repetitions()
    assert len(await books.rows("&action=test.gate.refuse")) == 1
    await books.log.write_repetitions()
    assert (await books.rows("&action=test.gate.refuse"))[-1]["details"]["count"] == 3


async def test_two_processes_write_one_chain(make_kit: Callable[..., Any], database_url: str) -> None:
    first = await Books(await make_kit(plugins=["audit", "admin"]), database_url).build()
    second = Books(await make_kit(plugins=["audit", "admin"]), database_url)
    await asyncio.gather(*[each.write(25) for each in (first, second) for _ in range(4)])
    verdict = await second.verify()
    assert verdict.ok, verdict
    assert verdict.head.seq >= 200


@pytest.mark.one_engine
async def test_only_refusals_of_privileged_requests_are_recorded(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit()
    admin, viewer = await kit.as_user("admin"), await kit.as_user("viewer")
    assert (await viewer.post("/tasks", {})).status == 403  # of members too
    assert (await viewer.put("/settings/audit/record_ip", {"value": True})).status == 403
    rows = (await admin.get(f"/admin/audit?outcome=denied&actor={viewer.user['id']}")).json()["items"]
    assert [row["object"]["id"] for row in rows] == ["PUT /settings/{category}/{key}"]
    assert rows[0]["object"]["name"] == "/api/v1/settings/audit/record_ip"


@pytest.mark.one_engine
async def test_failed_sign_ins_are_recorded(books: Books) -> None:
    body = {"email": "nobody@example.org", "password": "wrong wrong wrong"}
    assert (await books.kit.client.post("/auth/login", body)).status == 401
    (row,) = await books.rows("&outcome=failed")
    assert (row["actor"]["type"], row["actor"]["ip"], row["code"]) == ("anonymous", "127.0.0.1", "invalid_credentials")
    assert row["action"].startswith("auth.")
    assert "wrong" not in json.dumps(row)


@pytest.mark.one_engine
async def test_addresses_are_recorded_unless_that_is_off(books: Books) -> None:
    await books.admin.get("/admin/audit/checkpoints", headers={"user-agent": "curl/8"})
    assert (await books.rows("&action=audit.log.read"))[0]["actor"]["ip"] == "127.0.0.1"
    await books.set(RECORD_IP, False)
    await books.admin.get("/admin/audit/export", headers={"user-agent": "curl/8"})
    (row,) = await books.rows("&action=audit.log.export")
    assert (row["actor"]["ip"], row["actor"]["user_agent"]) == (None, None)


@pytest.mark.one_engine
async def test_verbose_records_every_request(books: Books) -> None:
    await books.admin.get("/admin/users")
    assert await books.rows("&object_type=route") == []
    await books.set(VERBOSE, True)
    await books.admin.get("/admin/users")
    await books.admin.get("/admin/users/01a216b0-0b93-771d-808d-9570a143f840")
    await books.kit.client.get("/health")
    rows = await books.rows("&action=admin.request.*")
    assert [(row["object"]["id"], row["outcome"], row["code"]) for row in rows] == [
        ("GET /admin/users", "success", None),
        ("GET /admin/users/{id}", "failed", "not_found"),
    ]
    assert not [row for row in await books.rows("&object_type=route") if "/health" in row["object"]["id"]]


@pytest.mark.one_engine
async def test_ordinary_requests_add_no_row(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit()
    member = await kit.as_user("member")
    before = await kit.kernel.database.work(queries.chain_ends, read=True)
    answer = await member.post("/agents", {"name": "Ada"})
    assert answer.status == 201, answer
    await member.get("/agents")
    assert await kit.kernel.database.work(queries.chain_ends, read=True) == before


@pytest.mark.one_engine
async def test_metrics(books: Books) -> None:
    await books.write(3)
    await books.write(1, outcome="failed")
    await books.sign()
    told: dict[str, str] = {}
    for _ in range(100):  # a scrape leaves out what the database does not answer at once
        text = (await books.kit.client.get("/metrics")).body.decode()
        told |= dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("corral_audit"))
        if 'corral_audit_rows_total{outcome="failed"}' in told and "corral_audit_last_checkpoint_age_seconds" in told:
            break
        await asyncio.sleep(0.1)
    assert float(told['corral_audit_rows_total{outcome="failed"}']) == 1
    assert float(told['corral_audit_rows_total{outcome="success"}']) >= 3
    assert float(told["corral_audit_write_failures_total"]) == 0
    assert 0 < float(told["corral_audit_append_seconds_sum"]) < 10
    assert 0 <= float(told["corral_audit_last_checkpoint_age_seconds"]) < 60


def test_settings_have_their_bounds() -> None:
    assert (RETENTION_DAYS.default, RETENTION_DAYS.minimum, VERBOSE.default, RECORD_IP.default) == (
        None,
        30,
        False,
        True,
    )
    assert len(chain.COLUMNS) == 22


async def test_a_repetition_is_counted_only_if_its_unit_commits(books: Books) -> None:
    denied = AuditEntry(action="tasks.request.write", object_type="task", object_id="one", outcome="denied")

    def rolled_back() -> None:
        books.log.record(denied)
        raise Conflict("no")

    await books.kit.work(lambda: books.log.record(denied))
    with pytest.raises(Conflict):
        await books.kit.work(rolled_back)
    assert books.log._deduplicator.take_ended(all=True) == []
    await books.kit.work(lambda: books.log.record(denied))
    for _ in range(2):
        await books.kit.work(lambda: books.log.record(denied))
    (repeated,) = books.log._deduplicator.take_ended(all=True)
    assert repeated.count == 2
