"""Registering, signing in and out, and the own account, over HTTP on both engines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral import clock
from corral.testing.kit import PASSWORD, Answer, Client, Kit
from corral_core.accounts.api import Accounts, UserPatch
from corral_core.accounts.service import passwords as passwords_module

MakeKit = Callable[..., Awaitable[Kit]]
OTHER = "an entirely other phrase"


@pytest.fixture
async def kit(make_kit: MakeKit) -> Kit:
    return await make_kit(plugins=[])


async def _login(kit: Kit, email: str, password: str = PASSWORD, **more: Any) -> Answer:
    return await kit.client.post("/auth/login", {"email": email, "password": password, **more})


def _registration(email: str, **more: Any) -> dict[str, Any]:
    return {"email": email, "password": PASSWORD, "full_name": "Somebody", **more}


def _signed_in(kit: Kit, answer: Answer) -> Client:
    assert answer.status == 200, answer
    return Client(kit.application.app, answer.json()["access_token"], answer.json()["user"])


async def _change(kit: Kit, user_id: str, **patch: Any) -> None:
    accounts = kit.kernel.container.get(Accounts)
    await kit.kernel.database.work(lambda: accounts.update(user_id, UserPatch(**patch)))


async def test_auth_1_register_login_me_refresh_logout(kit: Kit) -> None:
    made = await kit.client.post("/auth/register", _registration("Ann@Example.org"))
    assert (made.status, made.json()["email"], made.json()["role"]) == (201, "Ann@Example.org", "admin")
    answer = await _login(kit, "ann@example.ORG")
    first = answer.json()
    assert (first["token_type"], first["expires_in"]) == ("Bearer", 900)
    assert answer.headers["cache-control"] == "no-store"
    client = _signed_in(kit, answer)
    me = (await client.get("/auth/me")).json()
    assert (me["id"], me["limited"], me["session"]["current"]) == (made.json()["id"], None, True)
    assert "plugins.write" in me["permissions"]
    assert "password" not in str(sorted(me)).replace("must_change_password", "")
    second = (await kit.client.post("/auth/refresh", {"refresh_token": first["refresh_token"]})).json()
    assert second["refresh_token"] != first["refresh_token"]
    client.token = second["access_token"]
    assert (await client.post("/auth/logout")).status == 204
    assert (await client.get("/auth/me")).code == "session_revoked"
    again = await kit.client.post("/auth/refresh", {"refresh_token": second["refresh_token"]})
    assert (again.status, again.code) == (401, "session_revoked")


async def test_exactly_one_first_registration_becomes_admin(kit: Kit) -> None:
    bodies = [_registration(f"p{n}@example.org") for n in range(8)]
    answers = await asyncio.gather(*[kit.client.post("/auth/register", body) for body in bodies])
    made = [each.json()["role"] for each in answers if each.status == 201]
    assert (made, {each.code for each in answers if each.status != 201}) == (["admin"], {"registration_closed"})


@pytest.mark.one_engine
async def test_with_open_registration_all_others_become_members(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], environ={"CORRAL_REGISTRATION": "open"})
    bodies = [_registration(f"p{n}@example.org") for n in range(8)]
    answers = await asyncio.gather(*[kit.client.post("/auth/register", body) for body in bodies])
    assert sorted(each.json()["role"] for each in answers) == ["admin"] + ["member"] * 7


@pytest.mark.one_engine
async def test_the_bootstrap_admin_comes_first_and_once(make_kit: MakeKit) -> None:
    environ = {"CORRAL_BOOTSTRAP_ADMIN_EMAIL": "root@example.org", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": OTHER}
    kit = await make_kit(plugins=[], environ={**environ, "CORRAL_REGISTRATION": "open"})
    assert (await _login(kit, "root@example.org", OTHER)).json()["user"]["role"] == "admin"
    later = await kit.client.post("/auth/register", _registration("late@example.org"))
    assert later.json()["role"] == "member"
    again = await make_kit(plugins=[], environ={**environ, "CORRAL_BOOTSTRAP_ADMIN_EMAIL": "second@example.org"})
    assert (await _login(again, "second@example.org", OTHER)).status == 401


@pytest.mark.one_engine
@pytest.mark.parametrize("field", ["role", "is_active", "id", "invented"])
async def test_admin_3_nobody_chooses_their_own_rights(kit: Kit, field: str) -> None:
    answer = await kit.client.post("/auth/register", _registration("ann@example.org", **{field: "admin"}))
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, f"/{field}")
    member = await kit.as_user()
    assert (await member.put("/auth/me", {field: "admin"})).status == 422


async def test_one_address_is_one_account_in_any_spelling(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], environ={"CORRAL_REGISTRATION": "open"})
    assert (await kit.client.post("/auth/register", _registration("ann@example.org"))).status == 201
    answer = await kit.client.post("/auth/register", _registration("ＡＮＮ@Example.org"))
    assert (answer.status, answer.code) == (409, "duplicate")
    assert "existing_id" not in answer.json()


@pytest.mark.one_engine
@pytest.mark.parametrize("mode", ["closed", "invite"])
async def test_closed_registration(make_kit: MakeKit, mode: str) -> None:
    kit = await make_kit(plugins=[], environ={} if mode == "invite" else {"CORRAL_REGISTRATION": mode})
    await kit.as_user("admin")
    answer = await kit.client.post("/auth/register", _registration("ann@example.org"))
    assert (answer.status, answer.code) == (403, "registration_closed")
    assert (await kit.client.get("/auth/config")).json()["registration"] == mode


@pytest.mark.one_engine
async def test_weak_passwords_are_told_every_broken_rule(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], config={"settings.password.require_digit": True})
    answer = await kit.client.post("/auth/register", _registration("annabel@example.org", password="annabel"))
    assert (answer.status, answer.code) == (422, "weak_password")
    assert {each["code"] for each in answer.json()["errors"]} == {"too_short", "core.context_word", "core.no_digit"}
    assert {each["pointer"] for each in answer.json()["errors"]} == {"/password"}


@pytest.mark.one_engine
async def test_wrong_address_wrong_password_and_deactivated_look_the_same(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = await kit.as_user(email="ann@example.org")
    verified: list[str | None] = []
    real = passwords_module._verify_hash

    def spy(password: str, known: str | None) -> bool:
        verified.append(known)
        return real(password, known)

    monkeypatch.setattr(passwords_module, "_verify_hash", spy)
    answers = [await _login(kit, "nobody@example.org"), await _login(kit, "ann@example.org", OTHER)]
    await _change(kit, member.user["id"], is_active=False)
    answers.append(await _login(kit, "ann@example.org"))
    assert {(each.status, each.code, each.json()["detail"]) for each in answers} == {
        (401, "invalid_credentials", "The email address or the password is incorrect.")
    }
    assert len(verified) == 3  # each cost one hash
    assert verified[2] is None


@pytest.mark.one_engine
async def test_a_password_of_1000_bytes_is_refused_unhashed(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords_module, "_verify_hash", lambda *_: pytest.fail("hashed"))
    monkeypatch.setattr(passwords_module, "_argon2_hasher", lambda: pytest.fail("hashed"))
    for path, body in (
        ("/auth/login", {"email": "ann@example.org", "password": "p" * 1000}),
        ("/auth/register", _registration("ann@example.org", password="p" * 1000)),
    ):
        answer = await kit.client.post(path, body)
        assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/password")


async def test_auth_6_a_deactivated_user_is_out(kit: Kit) -> None:
    answer = await _login(kit, (await kit.as_user()).user["email"])
    client = _signed_in(kit, answer)
    await _change(kit, client.user["id"], is_active=False)
    assert (await client.get("/auth/me")).code == "session_revoked"
    refreshed = await kit.client.post("/auth/refresh", {"refresh_token": answer.json()["refresh_token"]})
    assert refreshed.code == "session_revoked"
    await _change(kit, client.user["id"], is_active=True)
    assert (await client.get("/auth/me")).code == "session_revoked"  # rights come back, sessions do not
    assert (await _login(kit, client.user["email"])).status == 200


@pytest.mark.one_engine
async def test_who_must_change_the_password_can_do_little_else(kit: Kit) -> None:
    await kit.as_user("admin")
    email = (await kit.as_user("admin")).user["email"]
    client = await kit.sign_in(email)
    await _change(kit, client.user["id"], must_change_password=True)
    assert (await client.get("/auth/me")).json()["limited"] == "password_change_required"
    for path in ("/plugins", "/events", "/auth/sessions"):
        assert (await client.get(path)).code == "password_change_required"
    assert (await client.put("/auth/me", {"full_name": "New"})).code == "password_change_required"
    changed = await client.post("/auth/change-password", {"current_password": PASSWORD, "new_password": OTHER})
    free = _signed_in(kit, changed)
    assert (await free.get("/plugins")).status == 200
    assert (await free.get("/auth/me")).json()["limited"] is None


@pytest.mark.one_engine
async def test_changing_the_password_ends_all_other_sessions(kit: Kit) -> None:
    here_answer = await _login(kit, (await kit.as_user()).user["email"])
    here = _signed_in(kit, here_answer)
    there = await kit.sign_in(here.user["email"])
    wrong = await here.post("/auth/change-password", {"current_password": OTHER, "new_password": OTHER})
    assert (wrong.status, wrong.code) == (401, "invalid_credentials")
    weak = await here.post("/auth/change-password", {"current_password": PASSWORD, "new_password": "short"})
    assert (weak.code, weak.json()["errors"][0]["pointer"]) == ("weak_password", "/new_password")
    changed = await here.post("/auth/change-password", {"current_password": PASSWORD, "new_password": OTHER})
    assert (await there.get("/auth/me")).code == "session_revoked"
    assert (await here.get("/auth/me")).status == 200
    old = await kit.client.post("/auth/refresh", {"refresh_token": here_answer.json()["refresh_token"]})
    assert old.status == 401
    new = await kit.client.post("/auth/refresh", {"refresh_token": changed.json()["refresh_token"]})
    assert new.status == 200
    assert (await _login(kit, here.user["email"])).status == 401
    assert (await _login(kit, here.user["email"], OTHER)).status == 200
    updated = [each for each in await kit.events() if each.type == "user.updated"]
    assert updated[-1].payload() == {"user_id": here.user["id"], "changed": ["password"]}


async def test_the_profile(kit: Kit) -> None:
    client = await kit.as_user(email="ann@example.org")
    await kit.as_user(email="bob@example.org")
    profile = {"full_name": "Ann B.", "timezone": "Europe/Berlin", "locale": "de-DE", "preferences": {"a": [1]}}
    answer = await client.put("/auth/me", profile)
    assert answer.status == 200
    assert {name: answer.json()[name] for name in profile} == profile
    assert (await client.put("/auth/me", {})).json()["version"] == answer.json()["version"] == 2
    stale = await client.put("/auth/me", {"full_name": "X"}, headers={"If-Match": '"1"'})
    assert (stale.status, stale.json()["current_version"]) == (412, 2)
    zones = ({"timezone": "Mars/Base"}, {"timezone": "../etc/passwd"})
    for bad in (*zones, {"locale": "x"}, {"preferences": {"a": "b" * 9000}}):
        assert (await client.put("/auth/me", bad)).status == 422, bad
    assert (await client.put("/auth/me", {"email": "new@example.org"})).code == "reauth_required"
    wrong = {"email": "new@example.org", "current_password": OTHER}
    assert (await client.put("/auth/me", wrong)).code == "invalid_credentials"
    taken = {"email": "BOB@example.org", "current_password": PASSWORD}
    assert (await client.put("/auth/me", taken)).code == "duplicate"
    right = {"email": "New@example.org", "current_password": PASSWORD}
    assert (await client.put("/auth/me", right)).json()["email"] == "New@example.org"
    assert (await _login(kit, "new@example.org")).status == 200


@pytest.mark.one_engine
async def test_sessions_are_listed_and_ended(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], config={"settings.security.max_sessions_per_user": 3})
    email = (await kit.as_user()).user["email"]
    clients = [await kit.sign_in(email) for _ in range(3)]
    listed = (await clients[2].get("/auth/sessions")).json()["items"]
    assert [each["current"] for each in listed] == [True, False, False]  # the very first one had to go
    stranger = await kit.as_user()
    path = f"/auth/sessions/{listed[2]['id']}"
    assert (await stranger.delete(path)).status == 404
    assert (await clients[2].delete(path)).status == 204
    assert (await clients[2].delete(path)).status == 404
    assert (await clients[0].get("/auth/me")).code == "session_revoked"
    assert (await clients[2].post("/auth/logout-all", {"keep_current": True})).status == 204
    assert (await clients[1].get("/auth/me")).status == 401
    assert (await clients[2].get("/auth/me")).status == 200
    assert (await clients[2].post("/auth/logout-all")).status == 204
    assert (await clients[2].get("/auth/me")).status == 401


@pytest.mark.one_engine
async def test_a_session_that_idles_is_over(kit: Kit) -> None:
    answer = await _login(kit, (await kit.as_user()).user["email"])
    clock.travel(7 * 86_400 + 1)
    refreshed = await kit.client.post("/auth/refresh", {"refresh_token": answer.json()["refresh_token"]})
    assert (refreshed.status, refreshed.code) == (401, "token_expired")


@pytest.mark.one_engine
async def test_the_refresh_cookie_counts_for_own_pages_only(kit: Kit) -> None:
    answer = await _login(kit, (await kit.as_user()).user["email"], cookie=True)
    assert "refresh_token" not in answer.json()
    cookie = answer.headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=Strict", "Path=/api/v1/auth"))
    assert "Secure" not in cookie  # plain http on loopback
    sent = {"Cookie": cookie.partition(";")[0]}
    for origin in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        refused = await kit.client.post("/auth/refresh", headers={**sent, **origin})
        assert (refused.status, refused.code) == (403, "forbidden")
    fine = await kit.client.post("/auth/refresh", headers={**sent, "Origin": "http://localhost"})
    assert fine.status == 200
    assert fine.headers["set-cookie"] != cookie
    assert (await kit.client.post("/auth/refresh")).status == 422
    client = _signed_in(kit, fine)
    gone = await client.post("/auth/logout", headers=sent)
    assert "Max-Age=0" in gone.headers["set-cookie"]


@pytest.mark.one_engine
@pytest.mark.parametrize(
    "url",
    ["https://corral.example", "https://Corral.example/", "https://corral.example/sub/", "https://corral.example:443"],
)
async def test_behind_a_proxy_the_refresh_cookie_counts_for_the_public_url(make_kit: MakeKit, url: str) -> None:
    """Which passes on a Host of its own, as nginx does where it is not told otherwise."""
    kit = await make_kit(plugins=[], config={"server.public_url": url})
    answer = await _login(kit, (await kit.as_user()).user["email"], cookie=True)
    sent = {"Cookie": answer.headers["set-cookie"].partition(";")[0], "Host": "127.0.0.1:8000"}
    for origin in ("https://corral.example.evil", "http://corral.example", "://", "https://"):
        assert (await kit.client.post("/auth/refresh", headers={**sent, "Origin": origin})).status == 403
    assert (await kit.client.post("/auth/refresh", headers={**sent, "Origin": "https://corral.example"})).status == 200


@pytest.mark.one_engine
async def test_events_of_people_are_for_them_and_admins(kit: Kit) -> None:
    admin, ann, bob = await kit.as_user("admin"), await kit.as_user(), await kit.as_user()
    await kit.events()  # all are numbered now

    async def owners(client: Client) -> set[str]:
        items = (await client.get("/events?types=session.*&types=user.*&limit=200")).json()["items"]
        return {each["object"]["id"] for each in items if each["event"] == "user.created"}

    assert await owners(ann) == {ann.user["id"]}
    assert await owners(bob) == {bob.user["id"]}
    assert await owners(admin) >= {admin.user["id"], ann.user["id"], bob.user["id"]}
