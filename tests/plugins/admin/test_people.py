"""What admins do for people: links instead of passwords, locks, second factors; and what no key may do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from tests.kernel.mail.conftest import MailServer, token_of

from corral.testing.kit import PASSWORD, Client, Kit

pytestmark = pytest.mark.one_engine

NEW = {"email": "New@Example.org", "full_name": "New Person"}
CHOSEN = "a password of my own choice"


async def choose(kit: Kit, token: str) -> Any:
    return await kit.client.post("/auth/reset-password", {"token": token, "new_password": CHOSEN})


async def test_without_a_password_the_link_is_in_the_answer_once(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    made = await admin.post("/admin/users", NEW)
    assert made.status == 201, made
    assert made.headers["cache-control"] == "no-store"
    url = made.json()["set_password_url"]
    assert url.startswith("http://127.0.0.1:8000/account/reset-password#token=")
    shown = (await admin.get(f"/admin/users/{made.json()['id']}")).json()
    assert "set_password_url" not in shown
    nobody = await kit.client.post("/auth/login", {"email": "new@example.org", "password": PASSWORD})
    assert nobody.code == "invalid_credentials"
    assert (await choose(kit, token_of(url))).status == 200
    await kit.sign_in("new@example.org", CHOSEN)
    assert (await choose(kit, token_of(url))).code == "link_expired"


async def test_with_a_mail_service_the_link_is_mailed(make_kit: Callable[..., Any]) -> None:
    server = MailServer().start()
    try:
        kit: Kit = await make_kit(plugins=("admin",), config=server.config())
        admin = await kit.as_user("admin")
        made = await admin.post("/admin/users", NEW)
        assert "set_password_url" not in made.json()
        await kit.run_jobs()
        assert (await choose(kit, server.box.token("New@Example.org"))).status == 200
        reset = await admin.post(f"/admin/users/{made.json()['id']}/reset-password")
        await kit.run_jobs()
        mailed, shown = server.box.token("New@Example.org"), token_of(reset.json()["reset_url"])
        assert mailed != shown
        assert reset.json()["reset_url"].startswith("https://corral.example/account/reset-password#token=")
        assert (await choose(kit, mailed)).status == 200
        assert (await choose(kit, shown)).code == "link_expired"
    finally:
        server.stop()


async def test_admins_see_sessions_and_failures_beside_an_account(kit: Kit) -> None:
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    await kit.sign_in(member.user["email"])
    for _ in range(3):
        await kit.client.post("/auth/login", {"email": member.user["email"], "password": "wrong"})
    assert (await member.post("/security/api-keys", {"name": "script"})).status == 201
    made = (await admin.post("/admin/users", {**NEW, "password": CHOSEN})).json()
    assert (made["created_by"], made["sessions"], made["api_keys"]) == (admin.user["id"], 0, 0)
    listed = {user["id"]: user for user in (await admin.get("/admin/users")).json()["items"]}
    shown = listed[member.user["id"]]
    assert (shown["sessions"], shown["failed_attempts"], shown["created_by"]) == (2, 3, None)
    assert shown["api_keys"] == 1
    assert listed[made["id"]] == made
    assert not {"password", "password_hash", "preferences_of"} & shown.keys()


async def test_the_search_knows_names_in_any_case(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    made = await admin.post("/admin/users", {"email": "e@example.org", "full_name": "Émile STRAßE", "password": CHOSEN})
    assert made.status == 201, made

    async def found(text: str) -> list[str]:
        listed = (await admin.get(f"/admin/users?search={quote(text)}")).json()["items"]
        return [user["full_name"] for user in listed]

    for text in ("émile", "ÉMILE", "strasse", "E@EXAMPLE.org"):
        assert await found(text) == ["Émile STRAßE"], text
    assert await found("nobody") == []
    await admin.patch(f"/admin/users/{made.json()['id']}", {"full_name": "Zoë"})
    assert await found("ZOË") == ["Zoë"]
    assert await found("émile") == []


async def test_an_admin_ends_a_lock(kit: Kit) -> None:
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    email = member.user["email"]
    for _ in range(5):
        await kit.client.post("/auth/login", {"email": email, "password": "wrong"})
    assert (await kit.client.post("/auth/login", {"email": email, "password": PASSWORD})).code == "account_locked"
    path = f"/admin/users/{member.user['id']}"
    assert (await admin.get(path)).json()["locked_until"] is not None
    unlocked = await admin.post(f"{path}/unlock")
    assert (unlocked.status, unlocked.json()["locked_until"]) == (200, None)
    await kit.sign_in(email)


async def test_a_second_factor_is_removed_after_a_step_up(kit: Kit) -> None:
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    path = f"/admin/users/{member.user['id']}/reset-mfa"
    assert (await admin.post(path)).code == "reauth_required"
    assert (await admin.post("/auth/reauth", {"password": PASSWORD})).status == 200
    answer = await admin.post(path)
    assert (answer.status, answer.json()["mfa_enabled"]) == (200, False)


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/admin/users", NEW),
        ("PATCH", "/admin/users/{id}", {"role": "admin"}),
        ("POST", "/admin/users/{id}/unlock", None),
        ("POST", "/admin/users/{id}/reset-password", None),
        ("POST", "/admin/users/{id}/reset-mfa", None),
        ("POST", "/admin/invitations", {"email": "x@example.org"}),
    ],
)
async def test_no_key_manages_users(method: str, path: str, body: Any, kit: Kit) -> None:
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    key = await admin.post("/security/api-keys", {"name": "all", "scopes": ["*"]})
    assert key.status == 201, key
    client = Client(kit.application.app, key.json()["key"])
    assert (await client.get("/admin/users")).status == 200
    refused = await client.request(method, path.format(id=member.user["id"]), body)
    assert (refused.status, refused.code) == (403, "insufficient_scope")


async def test_unknown_people_and_fields_are_refused(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    nobody = "/admin/users/01a216b6-c749-7589-8dd4-5cb945cdb606"
    for method, path in (("GET", nobody), ("POST", f"{nobody}/unlock"), ("POST", f"{nobody}/reset-password")):
        assert (await admin.request(method, path)).status == 404, path
    assert (await admin.patch(nobody, {"role": "admin"})).status == 404
    own = f"/admin/users/{admin.user['id']}"
    for body in ({"email_verified": True}, {"role": "emperor"}, {"is_active": None}, {"id": "x"}):
        assert (await admin.patch(own, body)).status == 422, body
    assert (await admin.post("/admin/users", {**NEW, "is_active": False})).status == 422


async def test_registering_sets_neither_role_nor_state(kit: Kit) -> None:
    body = {"email": "eve@example.org", "full_name": "Eve", "password": CHOSEN}
    for more in ({"role": "admin"}, {"is_active": True}, {"email_verified": True}):
        assert (await kit.client.post("/auth/register", {**body, **more})).status == 422


async def test_actions_on_a_user_honour_if_match(kit: Kit) -> None:
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    await admin.post("/auth/reauth", {"password": PASSWORD})
    path = f"/admin/users/{member.user['id']}"
    for action in ("unlock", "reset-mfa", "reset-password"):
        version = (await admin.get(path)).json()["version"]
        stale = await admin.post(f"{path}/{action}", headers={"if-match": f'"{version + 1}"'})
        assert (stale.status, stale.code, stale.json()["current_version"]) == (412, "precondition_failed", version)
        assert (await admin.get(path)).json()["version"] == version
        assert (await member.get("/auth/me")).status == 200
        done = await admin.post(f"{path}/{action}", headers={"if-match": f'"{version}"'})
        assert done.status == 200, done
    assert (await member.get("/auth/me")).status == 401
