"""The HTTP contract: slash forms, methods, ids, conditional requests, idempotency, lists, long polls, failures."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import pytest_asyncio
from tests.engines import SQLITE
from tests.kernel.http.conftest import SLOW_READ, ProbePlugin, Thing
from tests.limits import within
from tests.shared_kernels import on_the_loop_of_the_module

from corral.asgi.endpoint import INLINE_BELOW
from corral.http.client_address import Hosts
from corral.http.idempotency import IdempotencyRow
from corral.ids import new_id
from corral.testing.kit import PASSWORD, Kit
from corral_core.accounts.models import UserRow

BOTH_WAYS = pytest.mark.parametrize(
    "probe", [{"server.fast_dispatch": True}, {"server.fast_dispatch": False}], indirect=True, ids=["table", "quart"]
)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["table", "quart"])
async def shared_probe(make_shared_kit: Any, request: pytest.FixtureRequest) -> Kit:
    """A kernel with the probe, for the tests in which every request is refused."""
    kit: Kit = await make_shared_kit(plugins=[ProbePlugin], config={"server.fast_dispatch": request.param})
    await kit.work(lambda: Thing._meta.database.create_tables([Thing]))
    return kit


@pytest.mark.one_engine
@BOTH_WAYS
async def test_t7_both_slash_forms_answer_without_redirect(probe: Kit) -> None:
    member = await probe.as_user()
    made = await member.post("/probe/things/", {"title": "a"})
    assert made.status == 201
    for path in (
        "/probe/things",
        "/probe/things/",
        f"/probe/things/{made.json()['id']}",
        f"/probe/things/{made.json()['id']}/",
    ):
        assert (await member.get(path)).status == 200
    upper = made.json()["id"].upper()
    assert (await member.get(f"/probe/things/{upper}")).json()["id"] == made.json()["id"]


@pytest.mark.one_engine
@BOTH_WAYS
async def test_crooked_paths_are_nobodys(probe: Kit) -> None:
    member = await probe.as_user()
    for path in (
        "/probe//things",
        "/probe/%2e%2e/things",
        "/probe%2fthings",
        "/probe\\things",
        "/probe/things/not-an-id",
        "/nope",
    ):
        answer = await member.get(path)
        assert (answer.status, answer.code) == (404, "not_found"), path
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.one_engine
@BOTH_WAYS
async def test_long_paths_are_not_cached(probe: Kit) -> None:
    """Anyone may send them: a thousand paths of 60 KiB each, in their encoded form, would stay in memory."""
    size = probe.application.pipeline.find_cached.cache_info
    assert (await probe.client.get("/auth/me")).status == 401
    before = size().currsize
    for path in (f"/{'a' * 600}", "/%F0%9F%98%80" * 60, f"/probe/things/{'%30' * 200}"):
        assert (await probe.client.get(path)).status == 404
    assert (before, size().currsize) == (1, 1)


@pytest.mark.one_engine
@BOTH_WAYS
async def test_methods(probe: Kit) -> None:
    member = await probe.as_user()
    await member.post("/probe/things", {"title": "a"})
    head = await member.request("HEAD", "/probe/things")
    assert (head.status, head.body) == (200, b"")
    options = await member.request("OPTIONS", "/probe/things")
    assert (options.status, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
    other = await member.request("PURGE", "/probe/things")
    assert (other.status, other.code, other.headers["allow"]) == (405, "method_not_allowed", "GET, HEAD, OPTIONS, POST")
    override = await member.request("GET", "/probe/things", headers={"X-HTTP-Method-Override": "DELETE"})
    assert override.status == 200


@pytest.mark.one_engine
@BOTH_WAYS
async def test_headers_of_every_answer(probe: Kit) -> None:
    member = await probe.as_user()
    for answer in (
        await member.get("/probe/things"),
        await member.get("/nope"),
        await probe.client.get("/probe/things"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["cache-control"] == "private, no-cache"
        assert "server" not in answer.headers
    assert (await member.get("/auth/me")).headers["cache-control"] == "no-store"
    assert (await probe.client.get("/auth/me")).headers["cache-control"] == "no-store"  # so are its refusals
    given = await member.get("/probe/things", headers={"X-Request-ID": "abc.1_2-3"})
    assert given.headers["x-request-id"] == "abc.1_2-3"
    refused = await member.get("/probe/things", headers={"X-Request-ID": "a b"})
    assert refused.headers["x-request-id"] != "a b"


@pytest.mark.one_engine
@BOTH_WAYS
async def test_credentials(probe: Kit) -> None:
    viewer, path = await probe.as_user("viewer"), "/probe/things"
    missing = await probe.client.get(path)
    assert (missing.status, missing.code) == (401, "unauthenticated")
    assert missing.headers["www-authenticate"].startswith("Bearer")
    forged = await probe.client.get(path, headers={"Authorization": "Bearer nonsense"})
    assert (forged.status, forged.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')
    two = await viewer.get(path, headers={"X-API-Key": "crl_x"})
    assert (two.status, two.code) == (400, "malformed_request")
    assert (await viewer.post(path, {"title": "a"})).code == "forbidden"
    # the order of checks: right before body
    assert (await viewer.post(path, content=b"{")).status == 403
    assert (await probe.client.post(path, content=b"{")).status == 401


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("content", "status", "code", "pointer"),
    [
        (b"{", 400, "malformed_json", None),
        (b'{"title": "a", "title": "b"}', 400, "malformed_json", None),
        (b'{"title": NaN}', 400, "malformed_json", None),
        (b'\xef\xbb\xbf{"title": "a"}', 400, "malformed_json", None),
        (b'{"title": "\xff"}', 400, "malformed_json", None),
        (b"[" * 100 + b"]" * 100, 400, "malformed_json", None),
        (b'{"title": "\\ud800"}', 422, "validation_error", "/title"),
        (b'{"title": "a\\u0000"}', 422, "validation_error", "/title"),
        (b'{"title": "a", "priority": 99999999999999999999}', 422, "validation_error", "/priority"),
        (b'{"title": "a", "priority": 10}', 422, "validation_error", "/priority"),
        (b'{"title": "a\\n"}', 422, "validation_error", "/title"),
        (b'{"title": "a", "role": "admin"}', 422, "validation_error", "/role"),
        (b"{}", 422, "validation_error", "/title"),
        (b"", 422, "validation_error", "/title"),
        (b"[]", 422, "validation_error", ""),
    ],
)
@on_the_loop_of_the_module
async def test_t2_to_t6_bad_bodies(
    shared_probe: Kit, content: bytes, status: int, code: str, pointer: str | None
) -> None:
    member = await shared_probe.as_user(email=f"{new_id()}@example.org")
    answer = await member.post("/probe/things", content=content)
    assert (answer.status, answer.code) == (status, code), answer
    assert answer.headers["content-type"] == "application/problem+json"
    if pointer is not None:
        assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]


@pytest.mark.one_engine
@BOTH_WAYS
async def test_t4_media_types(probe: Kit) -> None:
    member = await probe.as_user()
    for headers in (
        {"content-type": "text/plain"},
        {"content-type": "application/json; charset=latin1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "multipart/form-data"},
    ):
        answer = await member.post("/probe/things", content=b'{"title": "a"}', headers=headers)
        assert (answer.status, answer.code) == (415, "unsupported_media_type"), headers
    assert (
        await member.post("/probe/things", {"title": "a"}, headers={"content-type": "application/json; charset=UTF-8"})
    ).status == 201


@pytest.mark.one_engine
async def test_all_problems_of_a_body_at_once(probe: Kit) -> None:
    member = await probe.as_user()
    answer = await member.post("/probe/things", {"title": "", "priority": "x", "other": 1})
    found = {(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]}
    assert found == {("/title", "too_short"), ("/priority", "wrong_type"), ("/other", "unknown_field")}


@pytest.mark.one_engine
async def test_query_problems(probe: Kit) -> None:
    member = await probe.as_user()
    for query, pointer in (
        ("limit=0", "/query/limit"),
        ("limit=201", "/query/limit"),
        ("limit=a", "/query/limit"),
        ("offset=-1", "/query/offset"),
        ("limit=1&limit=2", "/query/limit"),
        ("nope=1", "/query/nope"),
        ("cursor=abc", "/query/cursor"),
    ):
        answer = await member.get(f"/probe/things?{query}")
        assert answer.status == 422, query
        assert answer.json()["errors"][0]["pointer"] == pointer, query
    assert (await member.get("/probe/things?" + "&".join(f"title={i}" for i in range(101)))).status == 400
    assert (await member.get("/probe/things?title=" + "a" * 9000)).status == 414


@pytest.mark.one_engine
async def test_etags(probe: Kit) -> None:
    member = await probe.as_user()
    made = await member.post("/probe/things", {"title": "a"})
    path = f"/probe/things/{made.json()['id']}"
    assert made.headers["location"] == f"/api/v1{path}"
    assert made.headers["etag"] == '"1"'
    assert (await member.get(path, headers={"If-None-Match": '"1"'})).status == 304
    stale = await member.patch(path, {"title": "b"}, headers={"If-Match": '"2"'})
    assert (stale.status, stale.code, stale.json()["current_version"]) == (412, "precondition_failed", 1)
    assert (await member.patch(path, {"title": "b"}, headers={"If-Match": "nonsense"})).status == 412
    assert (await member.patch(path, {"title": "b"}, headers={"If-Match": '"1"'})).headers["etag"] == '"2"'
    assert (await member.patch(path, {"title": "c"}, headers={"If-Match": "*"})).status == 200


async def test_idempotency(probe: Kit) -> None:
    member, other = await probe.as_user(), await probe.as_user()
    key = {"Idempotency-Key": "k1"}
    first = await member.post("/probe/things", {"title": "a"}, headers=key)
    again = await member.post("/probe/things/", {"title": "a"}, headers=key)
    assert (again.status, again.body) == (201, first.body)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    reused = await member.post("/probe/things", {"title": "b"}, headers=key)
    assert (reused.status, reused.code) == (422, "idempotency_key_reused")
    assert (await other.post("/probe/things", {"title": "a"}, headers=key)).json()["id"] != first.json()["id"]
    assert (await member.post("/probe/things", {"title": "a"}, headers={"Idempotency-Key": "k" * 256})).status == 422
    failed = await member.post("/probe/things", {"title": "taken"}, headers={"Idempotency-Key": "k2"})
    assert failed.code == "duplicate"
    assert (await member.post("/probe/things", {"title": "free"}, headers={"Idempotency-Key": "k2"})).status == 201


async def test_what_is_kept_of_a_keyed_request_does_not_let_a_password_be_guessed(probe: Kit) -> None:
    member = await probe.as_user()
    body = json.dumps({"password": PASSWORD}).encode()
    json_type = {"Content-Type": "application/json", "Idempotency-Key": "again"}
    first = await member.post("/auth/reauth", content=body, headers=json_type)
    assert first.status == 200
    again = await member.post("/auth/reauth", content=body, headers=json_type)
    assert (again.body, again.headers.get("idempotency-replayed")) == (first.body, "true")
    kept = await probe.kernel.database.work(lambda: list(IdempotencyRow.select().dicts()), read=True)
    assert len(kept) == 1
    assert hashlib.sha256(body).hexdigest() not in str(kept)
    other = await member.post("/auth/reauth", {"password": PASSWORD + "!"}, headers={"Idempotency-Key": "again"})
    assert other.code == "idempotency_key_reused"


async def test_conventions_4_the_same_keyed_post_at_once_creates_one(probe: Kit) -> None:
    member = await probe.as_user()
    answers = await asyncio.gather(
        *[member.post("/probe/things", {"title": "a"}, headers={"Idempotency-Key": "k"}) for _ in range(100)]
    )
    made = {answer.json()["id"] for answer in answers if answer.status == 201}
    assert len(made) == 1
    assert {answer.code for answer in answers if answer.status != 201} <= {"idempotency_in_progress"}
    assert await probe.kernel.database.work(lambda: Thing.select().count(), read=True) == 1


async def test_idempotency_of_a_handler_with_several_units(probe: Kit) -> None:
    member = await probe.as_user()
    body = {"title": "a", "priority": 1, "data": {}}
    first = await member.post("/probe/echo", body, headers={"Idempotency-Key": "e"})
    again = await member.post("/probe/echo", body, headers={"Idempotency-Key": "e"})
    assert (first.status, again.status, again.headers.get("idempotency-replayed")) == (200, 200, "true")


async def test_conventions_5_following_next_visits_each_row_once(probe: Kit) -> None:
    member = await probe.as_user()
    for index in range(60):
        await member.post("/probe/things", {"title": f"t{index}"})
    seen: list[str] = []
    answer = (await member.get("/probe/things?limit=7")).json()
    assert (answer["total"], answer["limit"], answer["offset"]) == (60, 7, 0)
    while True:
        seen += [item["title"] for item in answer["items"]]
        if answer["next"] is None:
            break
        await member.post("/probe/things", {"title": "later"})
        answer = (await member.get(f"/probe/things?limit=7&cursor={answer['next']}")).json()
        assert answer["offset"] is None
    assert seen == [f"t{index}" for index in reversed(range(60))]


@pytest.mark.one_engine
async def test_cursors_are_bound(probe: Kit) -> None:
    member, other = await probe.as_user(), await probe.as_user()
    for index in range(3):
        await member.post("/probe/things", {"title": f"t{index}"})
    cursor = (await member.get("/probe/things?limit=1")).json()["next"]
    assert (await member.get(f"/probe/things?limit=1&cursor={cursor}")).status == 200
    assert (await other.get(f"/probe/things?limit=1&cursor={cursor}")).code == "invalid_cursor"
    assert (await member.get(f"/probe/things?limit=1&title=a&cursor={cursor}")).code == "invalid_cursor"
    assert (await member.get(f"/probe/things?limit=1&cursor={cursor[:-4]}AAAA")).code == "invalid_cursor"
    assert (await member.get(f"/probe/things?offset=1&cursor={cursor}")).status == 422


async def test_unit_of_work_14_a_long_poll_wakes_by_the_bell_and_holds_no_unit(probe: Kit) -> None:
    member = await probe.as_user()
    waiting = asyncio.ensure_future(member.get(f"/probe/wait?count=1&until={time.time() + 30}"))
    await asyncio.sleep(0.3)
    async with asyncio.timeout(60):
        while probe.kernel.database.connection_usage()[0]:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)
    assert not waiting.done()
    await member.post("/probe/things", {"title": "a"})
    async with within(2):
        answer = await waiting
    assert answer.json() == {"count": 1}


async def test_unit_of_work_14_a_long_poll_ends_with_its_time(probe: Kit) -> None:
    member = await probe.as_user()
    answer = await member.get(f"/probe/wait?count=5&until={time.time() + 0.4}")
    assert answer.json() == {"count": 0}


async def test_unit_of_work_14_a_long_poll_ends_with_its_session(probe: Kit) -> None:
    member = await probe.as_user()
    waiting = asyncio.ensure_future(member.get(f"/probe/wait?count=1&until={time.time() + 20}"))
    await asyncio.sleep(0.3)
    assert (await member.post("/auth/logout")).status == 204
    async with within(2):
        answer = await waiting
    assert (answer.status, answer.code) == (401, "session_revoked")


async def test_unit_of_work_14_a_long_poll_ends_with_its_callers_rights_whichever_process_took_them(probe: Kit) -> None:
    viewer = await probe.as_user("viewer")
    waiting = asyncio.ensure_future(viewer.get(f"/probe/wait?count=1&until={time.time() + 20}"))
    await asyncio.sleep(0.3)
    demoted = UserRow.update(role="auditor").where(UserRow.id == viewer.user["id"])
    await probe.kernel.database.work(demoted.execute)  # nobody tells this process
    async with within(2.5):
        answer = await waiting
    assert (answer.status, answer.code) == (403, "forbidden")


@pytest.mark.one_engine
@BOTH_WAYS
async def test_a_bug_is_500_with_the_plugin_and_no_detail(probe: Kit) -> None:
    answer = await probe.client.get("/probe/raises")
    assert (answer.status, answer.code, answer.json()["plugin"]) == (500, "internal", "probe")
    assert "secret" not in answer.body.decode()
    assert probe.kernel.registry.error_counts("probe")[1] == 1


@pytest.mark.one_engine
async def test_t7_host(probe: Kit) -> None:
    for host, status in (
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:80", 200),
        ("evil.example", 400),
        ("localhost@evil.example", 400),
        ("evil.example/localhost", 400),
        ("", 400),
    ):
        answer = await probe.client.get("/auth/config", headers={"Host": host})
        assert answer.status == status, host
        assert status == 200 or answer.code == "invalid_host"
    assert (await probe.client.get("/health", headers={"Host": "evil.example"})).status == 200


def test_further_names_of_the_host_may_have_a_port() -> None:
    hosts = Hosts("https://Corral.example/", ["Inside.example:8443", "other.example"])
    for host in (b"inside.example", b"inside.example:8443", b"other.example:80", b"CORRAL.example.", b"[::1]:8000"):
        assert hosts(host), host
    for host in (b"", b":80", b"example", b"evil.example", b"inside.example.evil"):
        assert not hosts(host), host


async def test_t17_a_slow_read_does_not_stand_on_the_loop(probe: Kit) -> None:
    for _ in range(3):
        SLOW_READ.clear()
        slow = asyncio.ensure_future(probe.client.get("/probe/slow"))
        await asyncio.sleep(0.05)
        await probe.client.get("/health")
        assert not slow.done()
        SLOW_READ.set()
        await slow


@SQLITE
async def test_short_reads_move_to_the_event_loop_though_they_wait_for_a_thread(probe: Kit) -> None:
    """As under load, where every read waits longer than a short read may take (docs/adr/0004)."""
    pool, work, count = probe.kernel.database.pools[-1], probe.kernel.database.work, 10

    def all_done(reads: list[Any]) -> bool:
        return all(read.done() for read in reads)

    async def until(reached: Callable[[], bool]) -> None:
        while not reached():  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.001)

    async def read_late() -> None:
        gate = threading.Event()
        holding = [asyncio.ensure_future(work(gate.wait, read=True)) for _ in pool.threads]
        async with within(20):
            await until(lambda: all(thread.running for thread in pool.threads))
            reads = [asyncio.ensure_future(probe.client.get("/probe/thread")) for _ in range(count)]
            await until(lambda: pool.queue.qsize() + pool._shares.waiting("probe") >= count or all_done(reads))
            await asyncio.sleep(INLINE_BELOW)
            gate.set()
            await asyncio.gather(*holding, *reads, return_exceptions=True)  # what is held for 2 s is lost

    for _ in range(10):  # on a busy machine, some of the reads themselves may not be short
        await read_late()
        if (await probe.client.get("/probe/thread")).json() == {"name": threading.current_thread().name}:
            break
    else:
        pytest.fail("no read moved to the event loop")


@pytest.mark.one_engine
async def test_the_document_lists_what_is_served(probe: Kit) -> None:
    document: dict[str, Any] = (await probe.client.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]["/api/v1/probe/things"]) >= {"get", "post"}
    page = await probe.client.get("/docs")
    assert page.status == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("docs.js", "docs.css"):
        assert (await probe.client.get(f"/docs/{name}")).status == 200
    root = await probe.client.get("/", root=True)
    assert (root.status, root.json()["service"], root.json()["docs"]) == (200, "corral", "/api/v1/docs")
    browser = await probe.client.get("/", headers={"accept": "text/html,*/*;q=0.8"}, root=True)
    assert (browser.headers["content-type"], b"/api/v1/docs" in browser.body) == ("text/html; charset=utf-8", True)
    page = await probe.client.get("/problems/link_expired", root=True)
    assert (page.status, "Request a new link" in page.body.decode()) == (200, True)
