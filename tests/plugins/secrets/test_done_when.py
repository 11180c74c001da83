"""What the vault promises. 6 is R10 (`tests/promises`), and in test_keys.py.

7 waits for workflows; the same is tested here for the tools that send HTTP requests (`tests/plugins/tools`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.secrets.conftest import PLUGINS, VALUE, Safe, files_of, spellings

from corral.testing.kit import PASSWORD
from corral_plugins.secrets.models import SecretVersion

KEYS = {
    name: f"v1:{text}"
    for name, text in (
        ("right", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="),
        ("wrong", "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="),
    )
}
JWT = {"CORRAL_JWT_SECRET": "w8Zq3nB5vR7tY1uK4mD9sG2hJ6xC0pLe"}


async def everywhere(safe: Safe, folder: Path) -> dict[str, bytes]:
    """Files of the data folder and the database, rows of every table, all that the API tells of secrets."""
    found = files_of(folder)
    database = safe.kit.kernel.database

    def rows() -> bytes:
        tables = database.engine.get_tables()
        return b"\n".join(
            repr(row).encode()
            for table in tables
            for row in database.engine.execute_sql(f'SELECT * FROM "{table}"').fetchall()
        )

    found["rows"] = await safe.work(rows, read=True)
    listed = (await safe.admin.get("/secrets")).json()["items"]
    paths = [
        "/secrets",
        "/secrets/expiring?days=365",
        "/events?limit=200",
        "/admin/audit?limit=200",
        "/metrics",
        "/openapi.json",
    ]
    paths += [f"/secrets/{item['id']}{suffix}" for item in listed for suffix in ("", "/versions")]
    for path in paths:
        found[f"GET {path}"] = (await safe.admin.get(path)).body
    return found


async def test_secrets_1_a_value_is_found_nowhere_in_any_form(safe: Any, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    other = "Zw3ite-Wert-üß-0987654321-vault"
    made = await safe.create(VALUE, description="of the shop", expires_at="2099-01-01T00:00:00Z")
    answers = [
        await safe.admin.get(f"/secrets/{made['id']}"),
        await safe.admin.get("/secrets"),
        await safe.admin.put(f"/secrets/{made['id']}", {"value": other, "description": "newer"}),
        await safe.admin.post("/secrets", {"name": made["name"], "value": VALUE}),
        await safe.admin.post("/secrets", {"name": "x", "value": VALUE, "max_versions": 0}),
        await safe.admin.post("/secrets", {"name": "x y", "value": VALUE, "unknown": VALUE}),
        await safe.admin.post(f"/secrets/{made['id']}/rotate", {"value": VALUE, "grace_seconds": -1}),
        await safe.member.post("/secrets", {"name": "x", "value": VALUE}),
        await safe.admin.post("/secrets", {"name": "keyed", "value": VALUE}, headers={"Idempotency-Key": "one"}),
    ]
    assert [answer.status for answer in answers] == [200, 200, 200, 409, 422, 422, 422, 403, 201]
    found = await everywhere(safe, tmp_path)
    found |= {f"answer {number}": answer.body for number, answer in enumerate(answers)}
    found["logs"] = caplog.text.encode()
    hits = {
        (place, form)
        for place, data in found.items()
        for value in (VALUE, other)
        for form, text in spellings(value).items()
        if text in data
    }
    assert hits == set()
    assert len(found) > 20


async def test_secrets_2_reveal_asks_again_and_writes_it_down_first(safe: Any) -> None:
    made = await safe.create()
    refused = await safe.reveal(made["id"])
    assert (refused.status, refused.code) == (403, "reauth_required")
    assert (await safe.admin.post("/auth/reauth", {"password": "wrong " + PASSWORD})).status == 401
    await safe.step_up()
    for body in ({}, {"reason": "hm"}, {"reason": "x" * 501}):
        assert (await safe.admin.post(f"/secrets/{made['id']}/reveal", body)).status == 422
    answer = await safe.admin.post(f"/secrets/{made['id']}/reveal", {"reason": "the shop is down"})
    assert (answer.status, answer.json()) == (200, {"value": VALUE, "version": 1})
    assert answer.headers["cache-control"] == "no-store"
    audited = (await safe.admin.get("/admin/audit?action=secrets.secret.reveal")).json()["items"]
    done = [row for row in audited if row["outcome"] == "success"]
    assert [row["object"]["id"] for row in done] == [made["id"]]
    assert "the shop is down" in str(audited)
    told = (await safe.events("secret.revealed"))[0]
    assert told == {"secret_id": made["id"], "name": made["name"], "version": 1, "by": safe.admin.user["id"]}
    assert (await safe.admin.get(f"/secrets/{made['id']}")).json()["last_revealed_at"] is not None


async def test_secrets_2_without_the_audit_log_no_value_leaves(safe: Any) -> None:
    made = await safe.create()
    await safe.step_up()
    engine = safe.kit.kernel.database.engine
    table = "audit_rows"
    await safe.work(lambda: engine.execute_sql(f"ALTER TABLE {table} RENAME TO away"))
    answer = await safe.reveal(made["id"])
    assert (answer.status, answer.code) == (503, "audit_unavailable")
    assert VALUE.encode() not in answer.body
    await safe.work(lambda: engine.execute_sql(f"ALTER TABLE away RENAME TO {table}"))
    assert await safe.value(made["id"]) == VALUE
    assert len(await safe.events("secret.revealed")) == 1


async def test_secrets_2_without_an_audit_plugin_no_value_leaves(make_kit: Callable[..., Any]) -> None:
    safe = await Safe().build(await make_kit(plugins=("secrets",)))
    made = await safe.create()
    await safe.step_up()
    assert (await safe.reveal(made["id"])).code == "audit_unavailable"


async def test_secrets_3_a_form_sent_back_as_read_changes_nothing(safe: Any) -> None:
    made = await safe.create()
    path = f"/secrets/{made['id']}"
    for mask in (made["masked"], "*"):
        form = {"name": made["name"], "value": mask, "category": made["category"], "description": "typed"}
        answer = await safe.admin.put(path, form)
        assert (answer.status, answer.code) == (422, "masked_value_submitted")
    assert (await safe.admin.post(f"{path}/rotate", {"value": "****"})).code == "masked_value_submitted"
    answer = await safe.admin.put(path, {"description": "typed"})
    assert (answer.status, answer.json()["version"], answer.json()["description"]) == (200, 1, "typed")
    await safe.step_up()
    assert await safe.value(made["id"]) == VALUE


async def test_secrets_4_a_ciphertext_of_another_secret_does_not_open(safe: Any) -> None:
    one, two = await safe.create(), await safe.create("the value of the other secret")
    await safe.step_up()

    def copy() -> None:
        row = SecretVersion.get(SecretVersion.secret_id == one["id"])
        SecretVersion.update(sealed=row.sealed).where(SecretVersion.secret_id == two["id"]).execute()

    await safe.work(copy)
    answer = await safe.reveal(two["id"])
    assert (answer.status, answer.code) == (409, "secrets.damaged")
    assert VALUE.encode() not in answer.body
    alerts = await safe.until(lambda: safe.events("system.alert"))
    assert [(alert["kind"], alert["object"]["id"]) for alert in alerts] == [("secret_damaged", two["id"])]
    assert two["name"] in alerts[0]["title"]
    assert await safe.value(one["id"]) == VALUE


async def test_secrets_4_a_version_that_is_given_to_another_secret_does_not_open(safe: Any) -> None:
    made = [await safe.create(), await safe.create("the value of the other secret")]
    await safe.step_up()

    def swap() -> None:
        rows = [SecretVersion.get(SecretVersion.secret_id == each["id"]) for each in made]
        for row, owner in zip(rows, ("nobody", made[0]["id"]), strict=True):  # never two of one number
            SecretVersion.update(secret_id=owner).where(SecretVersion.id == row.id).execute()
        SecretVersion.update(secret_id=made[1]["id"]).where(SecretVersion.id == rows[0].id).execute()

    await safe.work(swap)
    for each in made:
        answer = await safe.reveal(each["id"])
        assert (answer.status, answer.code) == (409, "secrets.damaged")
        assert VALUE.encode() not in answer.body


async def test_secrets_5_a_wrong_key_seals_the_vault_and_the_right_one_opens_it(make_kit: Callable[..., Any]) -> None:
    async def world(key: str) -> Any:
        return await make_kit(plugins=PLUGINS, environ={"CORRAL_MASTER_KEY": KEYS[key], **JWT})

    safe = await Safe().build(await world("right"))
    made = await safe.create()
    before = await safe.work(lambda: list(SecretVersion.select().tuples()), read=True)
    wrong = await Safe().reopen(await world("wrong"))
    assert (await wrong.kit.client.get("/health")).status == 200
    await wrong.step_up()
    answers = [
        await wrong.reveal(made["id"]),
        await wrong.admin.post(f"/secrets/{made['id']}/rotate"),
        await wrong.admin.post("/secrets", {"name": "new", "value": "some new value"}),
        await wrong.admin.post("/secrets/rotate-master-key"),
    ]
    assert [(answer.status, answer.code) for answer in answers] == [(503, "vault_sealed")] * 4
    assert all(answer.headers["retry-after"] for answer in answers)
    assert (await wrong.admin.get(f"/secrets/{made['id']}")).status == 200
    status = (await wrong.admin.get("/secrets/key-status")).json()
    assert (status["sealed"], status["remaining"] > 0) == (True, True)
    assert [alert["kind"] for alert in await wrong.events("system.alert")] == ["vault_sealed"]
    await wrong.measured("corral_vault_sealed 1.0")
    after = await wrong.work(lambda: list(SecretVersion.select().tuples()), read=True)
    assert after == before
    again = await Safe().reopen(await world("right"))
    await again.step_up()
    assert await again.value(made["id"]) == VALUE


async def test_secrets_5_no_key_is_made_over_encrypted_rows(make_kit: Callable[..., Any], tmp_path: Path) -> None:
    kit = await make_kit(plugins=PLUGINS)
    await kit.as_user("admin")
    key = tmp_path / "data" / "master.key"
    text = key.read_text()
    key.unlink()
    sealed = await make_kit(plugins=PLUGINS)
    assert (sealed.kernel.keyring.sealed, key.exists()) == (True, False)
    assert (await sealed.client.get("/health")).status == 200
    login = {"email": "admin1@example.org", "password": PASSWORD}
    admin = await sealed.sign_in("admin1@example.org")
    answer = await admin.post("/secrets", {"name": "new", "value": "some new value"})
    assert (answer.status, answer.code) == (503, "vault_sealed")
    key.write_text(text)
    key.chmod(0o600)
    opened = await make_kit(plugins=PLUGINS)
    assert not opened.kernel.keyring.sealed
    assert (await opened.client.post("/auth/login", login)).status == 200
    assert not kit.kernel.keyring.sealed


async def test_secrets_8_a_secret_in_use_stays_and_a_restored_one_works_again(safe: Any) -> None:
    from corral_plugins.secrets.api import AttachedObject

    made = await safe.create(name="Shop")
    shop = AttachedObject(plugin="llm", kind="provider", id="acme")
    await safe.work(lambda: safe.service.attach("shop", shop, title="Acme", pointer="/x", by=None))
    shown = (await safe.admin.get(f"/secrets/{made['id']}")).json()
    assert shown["references"] == [{"kind": "provider", "id": "acme", "name": "Acme"}]
    answer = await safe.admin.delete(f"/secrets/{made['id']}")
    assert (answer.status, answer.code) == (409, "in_use")
    assert answer.json()["references"] == shown["references"]
    renamed = await safe.admin.put(f"/secrets/{made['id']}", {"name": "Store"})
    assert (renamed.status, renamed.code) == (409, "in_use")
    assert (await safe.admin.delete(f"/secrets/{made['id']}?force=true")).status == 204

    def use() -> str:
        found: str = safe.service.use_value("SHOP", "plugin:llm", "api.acme.org", attached=shop)
        return found

    with pytest.raises(Exception, match="no secret"):
        await safe.work(use, read=True)
    assert (await safe.admin.get(f"/secrets/{made['id']}")).json()["status"] == "deleted"
    assert (await safe.admin.post(f"/secrets/{made['id']}/restore")).status == 200
    assert await safe.work(use, read=True) == VALUE


async def test_secrets_5_everything_else_works_while_the_vault_is_sealed(make_kit: Callable[..., Any]) -> None:
    async def world(key: str) -> Any:
        return await make_kit(environ={"CORRAL_MASTER_KEY": KEYS[key], **JWT})

    safe = await Safe().build(await world("right"))
    await safe.create()
    wrong = await Safe().reopen(await world("wrong"))
    broken = [item for item in wrong.kit.kernel.plugins if item.state in ("failed", "blocked")]
    assert {item.name: item.reason for item in broken} == {}
    assert (await wrong.member.post("/agents", {"name": "helper"})).status == 201
    assert (await wrong.member.post("/tasks", {"title": "work"})).status == 201
    body = {"model": "scripted/echo", "messages": [{"role": "user", "content": "still here"}]}
    assert (await wrong.member.post("/llm/chat/completions", body)).status == 200
    health = await wrong.admin.get("/settings/health")
    assert b"Sealed" in health.body, health
