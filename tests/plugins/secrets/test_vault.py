"""Secrets as admins keep them: versions, rotation, lists, deletion, expiry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from tests.engines import POSTGRES
from tests.plugins.secrets.conftest import PLUGINS, VALUE, Safe
from tests.shared_kernels import on_the_loop_of_the_module

from corral import clock
from corral.http.idempotency import IdempotencyRow
from corral.ids import new_id
from corral.testing.kit import Answer, Client
from corral_core.accounts.models import SessionRow

DAY = 86_400


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_safe(make_shared_kit: Callable[..., Any]) -> Safe:
    """A safe for the tests in which every request is refused."""
    return await Safe().build(await make_shared_kit(plugins=PLUGINS))


@pytest.mark.one_engine
async def test_only_admins_and_only_metadata(safe: Any) -> None:
    made = await safe.create(category="api_key", description="for the shop", allowed_hosts=["Shop.Example.org"])
    assert made["masked"] == "********"
    assert "value" not in made
    assert (made["version"], made["status"], made["allowed_hosts"]) == (1, "active", ["shop.example.org"])
    found = await safe.admin.get(f"/secrets/{made['id']}")
    assert found.json() == made
    assert found.headers["cache-control"] == "no-store"
    for method, path in (
        ("GET", "/secrets"),
        ("GET", f"/secrets/{made['id']}"),
        ("POST", f"/secrets/{made['id']}/reveal"),
    ):
        assert (await safe.member.request(method, path)).status == 403


async def test_names_are_unique_in_any_case(safe: Any) -> None:
    made = await safe.create(name="Api.Key")
    again = await safe.admin.post("/secrets", {"name": "API.KEY", "value": "another value"})
    assert (again.status, again.code, again.json()["existing_id"]) == (409, "duplicate", made["id"])
    other = await safe.create(name="other")
    renamed = await safe.admin.put(f"/secrets/{other['id']}", {"name": "api.key"})
    assert (renamed.status, renamed.code) == (409, "duplicate")


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("fields", "pointer", "code"),
    [
        ({"name": "1st"}, "/name", "validation_error"),
        ({"value": ""}, "/value", "validation_error"),
        ({"value": "ž" * 40_000}, "/value", "validation_error"),
        ({"value": "***"}, "/value", "masked_value_submitted"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "/expires_at", "validation_error"),
        ({"allowed_consumers": ["somebody"]}, "/allowed_consumers/0", "validation_error"),
        ({"allowed_consumers": ["tool:http.fetch"]}, "/allowed_hosts", "validation_error"),
        ({"allowed_hosts": ["http://x.org"]}, "/allowed_hosts/0", "validation_error"),
        ({"max_versions": 101}, "/max_versions", "validation_error"),
        ({"version": 3}, "/version", "validation_error"),
    ],
)
@on_the_loop_of_the_module
async def test_what_a_secret_cannot_be(shared_safe: Any, fields: Any, pointer: str, code: str) -> None:
    answer = await shared_safe.admin.post("/secrets", {"name": "x", "value": VALUE, **fields})
    assert (answer.status, answer.code) == (422, code)
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
    assert (await shared_safe.admin.get("/secrets")).json()["total"] == 0


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"name": "1st"}, "1 to 128 letters, digits, _, . and -, beginning with a letter"),
        (
            {"allowed_consumers": ["llm"]},
            "plugin, agent, workflow, trigger, tool or worker_group, a colon, and a name or id, as in plugin:llm",
        ),
        (
            {"allowed_hosts": ["https://x.org"]},
            "the name of a host, such as api.example.org or *.example.org, without a scheme, port or path",
        ),
    ],
)
@on_the_loop_of_the_module
async def test_errors_say_in_words_what_is_accepted(shared_safe: Any, fields: Any, detail: str) -> None:
    answer = await shared_safe.admin.post("/secrets", {"name": "x", "value": VALUE, **fields})
    (fault,) = answer.json()["errors"]
    assert (fault["code"], fault["detail"]) == ("bad_format", detail)


@pytest.mark.one_engine
async def test_values_that_cannot_be_taken_out_of_texts_are_told_of(safe: Any) -> None:
    assert (await safe.create("hunter2"))["warnings"] == ["not_redactable"]
    made = await safe.create(VALUE)
    assert "warnings" not in made
    weaker = await safe.admin.put(f"/secrets/{made['id']}", {"value": "swordfish"})
    assert weaker.json()["warnings"] == ["not_redactable"]


@pytest.mark.one_engine
async def test_values_make_versions_and_the_oldest_go(safe: Any) -> None:
    made = await safe.create("first-value-0001", max_versions=2)
    path = f"/secrets/{made['id']}"
    for text in ("second-value-002", "third-value-0003"):
        assert (await safe.admin.put(path, {"value": text})).status == 200
    found = (await safe.admin.get(f"{path}/versions")).json()["items"]
    assert [(each["n"], each["state"]) for each in found] == [(3, "current"), (2, "old")]
    await safe.step_up()
    assert await safe.value(made["id"]) == "third-value-0003"
    assert (await safe.reveal(made["id"], version=2)).json() == {"value": "second-value-002", "version": 2}
    assert (await safe.reveal(made["id"], version=1)).status == 404
    back = await safe.admin.post(f"{path}/versions/2/restore")
    assert (back.status, back.json()["version"]) == (200, 4)
    assert await safe.value(made["id"]) == "second-value-002"


@pytest.mark.one_engine
async def test_a_destroyed_version_is_gone_for_ever(safe: Any) -> None:
    made = await safe.create("first-value-0001")
    path = f"/secrets/{made['id']}"
    await safe.admin.post(f"{path}/rotate")
    assert (await safe.admin.delete(f"{path}/versions/2")).code == "invalid_state"
    assert (await safe.admin.delete(f"{path}/versions/1")).status == 204
    states = (await safe.admin.get(f"{path}/versions")).json()["items"]
    assert [each["state"] for each in states] == ["current", "destroyed"]
    await safe.step_up()
    for answer in (await safe.reveal(made["id"], version=1), await safe.admin.post(f"{path}/versions/1/restore")):
        assert (answer.status, answer.code) == (410, "secrets.destroyed")
    assert (await safe.admin.get(path)).json()["version"] == 2


async def test_a_keyed_reveal_tells_anew_or_no_more(safe: Any) -> None:
    made = await safe.create()
    await safe.step_up()
    path, keyed = f"/secrets/{made['id']}", {"Idempotency-Key": "reveal"}

    async def reveal() -> Answer:
        answer: Answer = await safe.admin.post(f"{path}/reveal", {"reason": "a test wants it"}, headers=keyed)
        return answer

    for _ in range(2):
        answer = await reveal()
        assert (answer.status, answer.json()["value"]) == (200, VALUE)
        assert "idempotency-replayed" not in answer.headers
    audited = (await safe.admin.get("/admin/audit?action=secrets.secret.reveal")).json()
    assert audited["total"] == len(await safe.events("secret.revealed")) == 2
    assert (await safe.admin.delete(path)).status == 204
    assert (await reveal()).status == 404
    assert await safe.work(lambda: IdempotencyRow.select().count(), read=True) == 0


@pytest.mark.one_engine
async def test_rotation_generates_what_is_asked_for(safe: Any) -> None:
    made = await safe.create()
    await safe.step_up()
    path, seen = f"/secrets/{made['id']}", set()
    for body, length, allowed in (
        (None, 32, str.isalnum),
        ({"generate": {"length": 64, "charset": "hex"}}, 64, lambda text: set(text) <= set("0123456789abcdef")),
        ({"generate": {"length": 40, "charset": "ascii"}}, 40, lambda text: text.isascii() and text.isprintable()),
        ({"value": "a value of my own"}, 17, lambda text: text == "a value of my own"),
    ):
        answer = await safe.admin.post(f"{path}/rotate", body)
        assert answer.status == 200
        assert "value" not in answer.json()
        value = await safe.value(made["id"])
        assert len(value) == length
        assert allowed(value)
        seen.add(value)
    assert len(seen) == 4
    both = await safe.admin.post(f"{path}/rotate", {"value": "x" * 9, "generate": {}})
    assert (both.status, both.json()["errors"][0]["pointer"]) == (422, "/generate")


@pytest.mark.one_engine
async def test_the_etag_is_of_the_row_and_cas_of_the_value(safe: Any) -> None:
    made = await safe.create()
    path = f"/secrets/{made['id']}"
    tag = (await safe.admin.get(path)).headers["etag"]
    changed = await safe.admin.put(path, {"description": "new", "cas": 1}, headers={"If-Match": tag})
    assert (changed.status, changed.json()["version"]) == (200, 1)
    assert changed.headers["etag"] != tag
    stale = await safe.admin.put(path, {"description": "newer"}, headers={"If-Match": tag})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    late = await safe.admin.put(path, {"value": "another value 1", "cas": 2})
    assert (late.status, late.json()["current_version"]) == (412, 1)
    for method, suffix in (("DELETE", ""), ("POST", "/rotate")):
        assert (await safe.admin.request(method, path + suffix, headers={"If-Match": tag})).status == 412
    assert (await safe.admin.put(path, {})).headers["etag"] == changed.headers["etag"]


async def test_lists_are_by_name_and_filtered(safe: Any) -> None:
    for name, category in (("b", "token"), ("C", "general"), ("a", "token"), ("d.1", "own-kind")):
        await safe.create(name=name, category=category)

    async def names(query: str) -> list[str]:
        return [item["name"] for item in (await safe.admin.get(f"/secrets?{query}")).json()["items"]]

    assert await names("") == ["a", "b", "C", "d.1"]
    assert await names("category=token") == ["a", "b"]
    assert await names("search=D.1") == ["d.1"]
    assert await names("limit=2&offset=1") == ["b", "C"]
    first = (await safe.admin.get("/secrets?limit=3")).json()
    assert (first["total"], await names(f"limit=3&cursor={first['next']}")) == (4, ["d.1"])
    gone = next(item for item in first["items"] if item["name"] == "b")
    await safe.admin.delete(f"/secrets/{gone['id']}")
    assert (await names(""), await names("status=deleted")) == (["a", "C", "d.1"], ["b"])
    assert (await safe.admin.get("/secrets?status=lost")).status == 422


@pytest.mark.one_engine
async def test_expiry_ends_use_and_reveal(safe: Any) -> None:
    soon = clock.now(3 * DAY)
    made = await safe.create(expires_at=soon)
    later = await safe.create(expires_at=clock.now(60 * DAY))
    assert (made["status"], later["status"]) == ("expiring", "active")
    clock.travel(4 * DAY)
    safe.admin = await safe.kit.sign_in(safe.admin.user["email"])
    await safe.step_up()
    answer = await safe.reveal(made["id"])
    assert (answer.status, answer.code) == (410, "secret_expired")
    listed = (await safe.admin.get("/secrets/expiring")).json()["items"]
    assert [(item["id"], item["status"]) for item in listed] == [(made["id"], "expired")]
    listed = (await safe.admin.get("/secrets/expiring?days=90")).json()["items"]
    assert [item["id"] for item in listed] == [made["id"], later["id"]]
    assert (await safe.admin.put(f"/secrets/{made['id']}", {"expires_at": None})).json()["status"] == "active"
    assert await safe.value(made["id"]) == VALUE


async def test_reminders_come_once_each_and_anew_after_a_rotation(safe: Any) -> None:
    from corral.plugin import Settings
    from corral_plugins.secrets import jobs

    kernel = safe.kit.kernel
    made = await safe.create(expires_at=clock.now(40 * DAY))

    async def told() -> list[int]:
        for _ in range(2):
            await jobs.remind_of_expiry(kernel.database.work, kernel.container.get(Settings))
        return [data["days_left"] for data in await safe.events("secret.expiring")]

    assert await told() == []
    for days, expected in ((11, [29]), (10, [29]), (12.5, [29, 7]), (6, [29, 7, 1]), (1, [29, 7, 1, 0])):
        clock.travel(days * DAY)
        assert await told() == expected, days
    safe.admin = await safe.kit.sign_in(safe.admin.user["email"])
    await safe.admin.put(f"/secrets/{made['id']}", {"expires_at": clock.now(5 * DAY)})
    assert await told() == [29, 7, 1, 0, 5]


async def test_a_deleted_secret_is_shredded_after_its_time(safe: Any) -> None:
    from corral.plugin import Audit, Settings
    from corral_plugins.secrets import jobs
    from corral_plugins.secrets.models import SecretRow, SecretVersion

    kernel = safe.kit.kernel
    kept, gone = await safe.create(), await safe.create()
    await safe.admin.delete(f"/secrets/{gone['id']}")
    assert (await safe.admin.delete(f"/secrets/{gone['id']}")).status == 404
    clock.travel(31 * DAY)
    await jobs.shred_deleted_secrets(kernel.database.work, kernel.container.get(Settings), kernel.container.get(Audit))
    rows = await safe.work(lambda: [[row.id for row in SecretRow], [row.secret_id for row in SecretVersion]])
    assert rows == [[kept["id"]], [kept["id"]]]
    safe.admin = await safe.kit.sign_in(safe.admin.user["email"])
    assert (await safe.admin.post(f"/secrets/{gone['id']}/restore")).status == 404
    (told,) = (await safe.admin.get("/admin/audit?action=secrets.secret.shred")).json()["items"]
    assert (told["actor"]["type"], told["object"]["id"]) == ("system", gone["id"])


@POSTGRES
async def test_what_is_being_restored_is_not_shredded(safe: Any, database_url: str) -> None:
    from corral.plugin import Settings
    from corral_plugins.secrets import jobs

    made, kernel = await safe.create(), safe.kit.kernel
    await safe.admin.delete(f"/secrets/{made['id']}")
    clock.travel(31 * DAY)
    with psycopg.connect(database_url) as restoring:
        restoring.execute("UPDATE secrets_secrets SET deleted_at = NULL WHERE id = %s", (made["id"],))
        shredding = asyncio.ensure_future(
            jobs.shred_deleted_secrets(kernel.database.work, kernel.container.get(Settings), None)
        )
        await asyncio.sleep(0.5)  # it waits for the restored row, or has the values deleted already
        restoring.commit()
    await shredding
    safe.admin = await safe.kit.sign_in(safe.admin.user["email"])
    await safe.step_up()
    assert await safe.value(made["id"]) == VALUE


@pytest.mark.one_engine
async def test_a_restored_secret_needs_its_name(safe: Any) -> None:
    gone = await safe.create(name="taken")
    await safe.admin.delete(f"/secrets/{gone['id']}")
    await safe.create(name="TAKEN")
    answer = await safe.admin.post(f"/secrets/{gone['id']}/restore")
    assert (answer.status, answer.code) == (409, "duplicate")


async def test_the_environment_pins_secrets(make_kit: Callable[..., Any]) -> None:
    environ = {"CORRAL_SECRET_PINNED": VALUE, "CORRAL_SECRET_Z_LAST": "another pinned value"}
    safe = await Safe().build(await make_kit(plugins=PLUGINS))
    await safe.create(name="pinned", value="the stored one of the name")
    await safe.create(name="middle")
    safe = await Safe().reopen(await make_kit(plugins=PLUGINS, environ=environ))
    listed = (await safe.admin.get("/secrets")).json()
    assert [(item["name"], item["read_only"]) for item in listed["items"]] == [
        ("middle", False),
        ("PINNED", True),
        ("Z_LAST", True),
    ]
    pages: list[str] = []
    for offset in range(4):
        page = (await safe.admin.get(f"/secrets?limit=1&offset={offset}")).json()
        pages += [item["name"] for item in page["items"]]
    assert (pages, listed["total"]) == (["middle", "PINNED", "Z_LAST"], 3)
    first = (await safe.admin.get("/secrets?limit=1")).json()
    second = (await safe.admin.get(f"/secrets?limit=1&cursor={first['next']}")).json()
    assert [item["name"] for item in second["items"]] == ["PINNED"]
    pinned = listed["items"][1]
    assert (await safe.admin.get(f"/secrets/{pinned['id']}")).json() == pinned
    for method, path, body in (
        ("PUT", f"/secrets/{pinned['id']}", {"description": "x"}),
        ("DELETE", f"/secrets/{pinned['id']}", None),
        ("POST", f"/secrets/{pinned['id']}/rotate", None),
        ("POST", "/secrets", {"name": "Pinned", "value": "x"}),
    ):
        answer = await safe.admin.request(method, path, body)
        assert (answer.status, answer.code) == (409, "setting_locked"), path
    assert safe.kit.kernel.redactor.redact(f"it is {VALUE}") == "it is [redacted]"
    assert (await safe.admin.get(f"/secrets/{pinned['id']}/versions")).json()["items"] == []
    assert (await safe.reveal(pinned["id"])).code == "reauth_required"
    await safe.step_up()
    assert (await safe.reveal(pinned["id"])).json() == {"value": VALUE, "version": 1}
    assert (await safe.events("secret.revealed"))[-1]["name"] == "PINNED"


async def test_the_values_of_secrets_with_the_same_name_are_all_redacted(make_kit: Callable[..., Any]) -> None:
    values = ["the pinned value of it", "a value that is deleted", "a value that is stored"]
    safe = await Safe().build(await make_kit(plugins=PLUGINS))
    deleted = await safe.create(values[1], name="SAME")
    assert (await safe.admin.delete(f"/secrets/{deleted['id']}")).status == 204
    await safe.create(values[2], name="SAME")
    safe = await Safe().reopen(await make_kit(plugins=PLUGINS, environ={"CORRAL_SECRET_SAME": values[0]}))
    assert [safe.kit.kernel.redactor.redact(value) for value in values] == ["[redacted]"] * 3


@pytest.mark.one_engine
async def test_a_person_is_shown_thirty_values_an_hour(make_kit: Callable[..., Any]) -> None:
    plugins = (*PLUGINS, "security")
    safe = await Safe().build(await make_kit(plugins=plugins, config={"rate_limits": True}))
    made = await safe.create()
    await safe.step_up()
    for _ in range(30):
        assert (await safe.reveal(made["id"])).status == 200
    late = await safe.reveal(made["id"])
    assert (late.status, late.code) == (429, "rate_limited")
    assert 0 < int(late.headers["retry-after"]) <= 3600
    assert len(await safe.events("secret.revealed")) == 30


@pytest.mark.one_engine
async def test_a_key_needs_the_scope_by_its_full_name(make_kit: Callable[..., Any]) -> None:
    safe = await Safe().build(await make_kit(plugins=(*PLUGINS, "security")))
    made = await safe.create()
    early = await safe.admin.post("/security/api-keys", {"name": "early", "scopes": ["secrets.reveal"]})
    assert (early.status, early.code) == (403, "reauth_required")  # what the session may not, its key may not for it
    await safe.step_up()

    async def reveals(scope: str) -> tuple[int, str | None]:
        answer = await safe.admin.post("/security/api-keys", {"name": scope, "scopes": [scope]})
        assert answer.status == 201, answer
        key = Client(safe.kit.application.app, answer.json()["key"])
        shown = await key.post(f"/secrets/{made['id']}/reveal", {"reason": "a script wants it"})
        return shown.status, shown.code

    for scope in ("*", "secrets.*", "secrets.read", "secrets.write"):
        assert await reveals(scope) == (403, "insufficient_scope"), scope
    assert await reveals("secrets.reveal") == (200, None)
    await safe.kit.kernel.database.work(lambda: SessionRow.update(reauth_until=None).execute())
    safe.kit.kernel.credentials.forget(lambda principal: True)
    keys = (await safe.admin.get("/security/api-keys")).json()["items"]
    (found,) = [each["id"] for each in keys if each["scopes"] == ["secrets.reveal"]]
    late = await safe.admin.post(f"/security/api-keys/{found}/rotate", {})
    assert (late.status, late.code) == (403, "reauth_required")


@pytest.mark.one_engine
async def test_an_unknown_secret_is_not_found(safe: Any) -> None:
    for method, suffix in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/rotate"), ("GET", "/versions")):
        assert (await safe.admin.request(method, f"/secrets/{new_id()}{suffix}")).status == 404
