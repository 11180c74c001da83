"""What the policy asks of people: a second factor, newer passwords, shorter sessions, and proof before what is
dangerous.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import pytest
from tests.kernel.auth.authenticator import AuthenticatorApp

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import SIGNED_IN, Principal
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral.settings.registry import SettingsRegistry
from corral.testing.kit import PASSWORD, Client, Kit
from corral_core.accounts.models import FormerPasswordRow, SessionRow, UserRow
from corral_core.accounts.service import passwords as passwords_module
from corral_core.accounts.service.sessions import Sessions

pytestmark = pytest.mark.one_engine

MakeKit = Callable[..., Awaitable[Kit]]
OTHER, THIRD = "an entirely other phrase", "yet one more long sentence"
routes = Routes("/vault", tag="Vault")


class Opened(msgspec.Struct, kw_only=True):
    """It is open."""

    by: str


@routes.post("/open", needs=SIGNED_IN, step_up=True)
def open_vault(caller: Principal) -> Opened:
    """Do what is dangerous."""
    return Opened(by=caller.id)


class VaultPlugin(Plugin):
    """Vault: a route that asks for a step-up."""

    name = "vault"

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]


def _set(kit: Kit, **values: Any) -> None:
    """Change settings of a running kernel, as the `settings` plugin does."""
    registry = kit.kernel.container.get(SettingsRegistry)
    registry.set_values({name.replace("__", "."): value for name, value in values.items()})
    kit.kernel.container.get(Credentials).forget(lambda caller: True)  # as a second later


async def _change(client: Any, current: str, new: str) -> Any:
    return await client.post("/auth/change-password", {"current_password": current, "new_password": new})


async def test_a_required_second_factor_limits_sessions_until_it_is_set_up(kit: Kit, door: Any) -> None:
    admin = await kit.as_user("admin")
    assert (await admin.get("/plugins")).status == 200
    _set(kit, security__require_mfa=True, security__require_mfa_roles=["admin"])
    assert (await kit.client.get("/auth/config")).json()["mfa_required"]
    assert (await admin.get("/auth/me")).json()["limited"] == "mfa_required"
    for method, path in (("GET", "/plugins"), ("GET", "/auth/sessions"), ("POST", "/auth/logout-all")):
        refused = await admin.request(method, path)
        assert (refused.status, refused.code) == (403, "mfa_required"), path
    assert (await (await kit.as_user("member")).get("/auth/sessions")).status == 200
    fresh = await kit.sign_in(admin.user["email"])
    secret = (await fresh.post("/auth/mfa/setup")).json()["secret"]
    app = type((await door.with_mfa())[1])(secret)
    assert (await fresh.post("/auth/mfa/verify", {"code": app.code()})).status == 200
    assert (await fresh.get("/plugins")).status == 200
    assert (await admin.get("/auth/me")).json()["limited"] is None


async def test_a_limited_session_opens_no_socket(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], config={"settings.security.require_mfa": True})
    client = await kit.as_user()
    assert (await client.post("/auth/ws-ticket")).code == "mfa_required"


async def test_a_password_that_is_too_old_must_be_changed_at_the_next_sign_in(kit: Kit, door: Any) -> None:
    client = await kit.as_user(email="ann@example.org")
    clock.travel(3 * 86_400)
    client = await kit.sign_in("ann@example.org")
    _set(kit, password__max_age_days=2)
    assert (await client.get("/auth/me")).json()["limited"] is None  # from the next sign-in on
    answer = await door.login("ann@example.org")
    assert answer.json()["user"]["must_change_password"]
    limited = door.client(answer)
    assert (await limited.get("/auth/sessions")).code == "password_change_required"
    changed = await _change(limited, PASSWORD, OTHER)
    assert (changed.status, changed.json()["user"]["must_change_password"]) == (200, False)
    assert not (await door.login("ann@example.org", OTHER)).json()["user"]["must_change_password"]


async def test_former_passwords_do_not_come_back(kit: Kit) -> None:
    _set(kit, password__history=1)
    client = await kit.as_user(email="ann@example.org")
    same = await _change(client, PASSWORD, PASSWORD)
    assert (same.status, same.code) == (422, "weak_password")
    assert same.json()["errors"][0] | {"detail": ""} == {
        "pointer": "/new_password",
        "code": "core.reused",
        "detail": "",
    }
    assert (await _change(client, PASSWORD, OTHER)).status == 200
    assert (await _change(client, OTHER, PASSWORD)).code == "weak_password"
    assert (await _change(client, "a wrong guess it is", PASSWORD)).code == "invalid_credentials"  # no oracle
    assert (await _change(client, OTHER, THIRD)).status == 200
    assert (await _change(client, THIRD, PASSWORD)).status == 200  # one is remembered, not two
    rows = await kit.kernel.database.work(lambda: FormerPasswordRow.select().count(), read=True)
    assert rows == 1
    _set(kit, password__history=0)
    assert (await _change(client, PASSWORD, PASSWORD)).code == "weak_password"  # that would be no change
    assert (await _change(client, PASSWORD, THIRD)).status == 200


async def test_shorter_lives_hold_for_sessions_in_being(kit: Kit, door: Any) -> None:
    await kit.as_user(email="ann@example.org")
    answer = await door.login("ann@example.org")
    client, refresh = door.client(answer), {"refresh_token": answer.json()["refresh_token"]}
    clock.travel(200)
    assert (await client.get("/auth/me")).status == 200
    _set(kit, security__access_ttl_seconds=60)
    assert (await client.get("/auth/me")).code == "token_expired"
    _set(kit, security__access_ttl_seconds=3600, security__refresh_idle_seconds=3600)
    renewed = await kit.client.post("/auth/refresh", refresh)
    client, refresh = door.client(renewed), {"refresh_token": renewed.json()["refresh_token"]}
    clock.travel(3595)
    assert len((await client.get("/auth/sessions")).json()["items"]) >= 1
    clock.travel(6)
    assert (await kit.client.post("/auth/refresh", refresh)).code == "token_expired"
    sessions, work = kit.kernel.container.get(Sessions), kit.kernel.database.work
    assert await work(sessions.end_expired) == 2
    reasons = await work(lambda: {row.end_reason for row in SessionRow.select()}, read=True)
    assert reasons == {"expired"}


async def test_the_longest_life_ends_a_session_however_busy_it_is(kit: Kit, door: Any) -> None:
    await kit.as_user(email="ann@example.org")
    token = (await door.login("ann@example.org")).json()["refresh_token"]
    for _ in range(6):
        clock.travel(6 * 86_400 - 3600)
        answer = await kit.client.post("/auth/refresh", {"refresh_token": token})
        if answer.status != 200:
            break
        token = answer.json()["refresh_token"]
    assert (answer.status, answer.code) == (401, "token_expired")


async def test_a_step_up_counts_for_a_while_on_its_own_session(make_kit: MakeKit, open_door: Any) -> None:
    kit = await make_kit(plugins=[VaultPlugin], config={"settings.security.step_up_seconds": 120})
    door = open_door(kit)
    client = await kit.as_user(email="ann@example.org")
    other = await kit.sign_in("ann@example.org")
    refused = await client.post("/vault/open")
    assert (refused.status, refused.code) == (403, "reauth_required")  # a plain sign-in does not count
    for body in ({}, {"password": PASSWORD, "code": "123456"}, {"password": ""}):
        assert (await client.post("/auth/reauth", body)).status == 422
    assert (await client.post("/auth/reauth", {"code": "123456"})).code == "invalid_credentials"
    assert (await client.post("/auth/reauth", {"password": OTHER})).code == "invalid_credentials"
    done = await client.post("/auth/reauth", {"password": PASSWORD})
    assert done.status == 200
    assert clock.now(110) < done.json()["reauth_until"] <= clock.now(120)
    assert (await client.get("/auth/me")).json()["session"]["reauth_until"] == done.json()["reauth_until"]
    assert (await client.post("/vault/open")).status == 200
    assert (await other.post("/vault/open")).code == "reauth_required"
    clock.travel(121)
    assert (await client.post("/vault/open")).code == "reauth_required"
    with_mfa, app, _ = await door.with_mfa()
    clock.travel(30)
    assert (await with_mfa.post("/auth/reauth", {"code": app.code()})).status == 200
    assert (await with_mfa.post("/vault/open")).status == 200


async def test_a_due_rehash_happens_at_the_next_sign_in(kit: Kit, door: Any) -> None:
    from argon2 import PasswordHasher

    client = await kit.as_user(email="ann@example.org")
    weak = PasswordHasher(time_cost=1, memory_cost=8192, parallelism=1).hash(PASSWORD)
    work = kit.kernel.database.work
    await work(lambda: UserRow.update(password_hash=weak).where(UserRow.id == client.user["id"]).execute())
    assert (await door.login("ann@example.org")).status == 200
    stored = await work(lambda: UserRow.get_by_id(client.user["id"]).password_hash, read=True)
    assert stored is not None
    assert stored != weak
    assert not passwords_module.Passwords.needs_rehash(stored)
    assert (await door.login("ann@example.org")).status == 200


async def test_unproven_addresses_are_told_only_to_who_knows_the_password(make_kit: MakeKit, open_door: Any) -> None:
    kit = await make_kit(plugins=[], config={"settings.security.email_verification": True})
    door = open_door(kit)
    client = await kit.as_user(email="ann@example.org")
    work = kit.kernel.database.work
    await work(lambda: UserRow.update(email_verified=False).where(UserRow.id == client.user["id"]).execute())
    assert (await door.login("ann@example.org", OTHER)).code == "invalid_credentials"
    unproven = await door.login("ann@example.org")
    assert (unproven.status, unproven.code) == (403, "email_unverified")
    assert (await kit.client.get("/auth/config")).json()["email_verification"]


async def test_auth_8_all_128_characters_of_a_password_count(kit: Kit, door: Any, monkeypatch: Any) -> None:
    long = "correct horse " * 9 + "z"
    first, second = long + "1", long + "2"
    assert len(first) == 128
    made = await kit.client.post("/auth/register", {"email": "ann@example.org", "password": first, "full_name": "Ann"})
    assert made.status == 201
    assert (await door.login("ann@example.org", second)).code == "invalid_credentials"
    assert (await door.login("ann@example.org", first)).status == 200
    client = await kit.as_user()
    monkeypatch.setattr(passwords_module, "_verify_hash", lambda *_: pytest.fail("hashed"))
    monkeypatch.setattr(passwords_module, "_argon2_hasher", lambda: pytest.fail("hashed"))
    too_long = first + "x"
    for answer in (
        await door.login("ann@example.org", too_long),
        await _change(client, too_long, OTHER),
        await client.post("/auth/reauth", {"password": too_long}),
        await client.post("/auth/mfa/setup", {"password": too_long}),
        await kit.client.post("/auth/register", {"email": "b@example.org", "password": too_long, "full_name": "B"}),
    ):
        assert (answer.status, answer.json()["errors"][0]["code"]) == (422, "too_long")


async def test_metrics_of_signing_in(kit: Kit, door: Any) -> None:
    await kit.as_user(email="ann@example.org")
    answer = await door.login("ann@example.org")
    await kit.client.post("/auth/refresh", {"refresh_token": answer.json()["refresh_token"]})
    for _ in range(5):
        await door.login("nobody@example.org", OTHER)
    await door.login("nobody@example.org", OTHER)
    text = (await kit.client.get("/metrics")).body.decode()
    for series in (
        'corral_auth_attempts_total{result="success"} 1',
        'corral_auth_attempts_total{result="failed"} 5',
        'corral_auth_attempts_total{result="locked"} 1',
        "corral_auth_lockouts_total 1",
        'corral_auth_refresh_total{result="success"} 1',
        "corral_sessions_active 2.0",
        "corral_password_hash_seconds_count 6",
    ):
        assert series in text, series


async def test_what_one_process_was_told_the_next_request_finds_in_another(make_kit: MakeKit) -> None:
    """Also where that one has just read the caller as somebody who may not."""
    kits = [await make_kit(plugins=[VaultPlugin]) for _ in range(2)]
    here = await kits[0].as_user(email="ann@example.org")
    there = Client(kits[1].application.app, here.token)
    assert (await there.post("/vault/open")).code == "reauth_required"
    assert (await here.post("/auth/reauth", {"password": PASSWORD})).status == 200
    assert (await there.post("/vault/open")).status == 200
    for kit in kits:
        _set(kit, security__require_mfa=True)
    assert (await there.get("/auth/sessions")).code == "mfa_required"
    app = AuthenticatorApp((await here.post("/auth/mfa/setup")).json()["secret"])
    assert (await here.post("/auth/mfa/verify", {"code": app.code()})).status == 200
    assert (await there.get("/auth/sessions")).status == 200


def test_the_principals_of_an_ended_lease_are_forgotten_without_a_look_at_the_others() -> None:
    credentials = Credentials()
    for number in range(3):
        principal = Principal(kind="agent", id="agent", lease_id=f"lease {number}")
        credentials.cache((b"Bearer %d" % number, None), principal)
    credentials.cache((b"bearer 1", None), Principal(kind="agent", id="agent", lease_id="lease 1"))
    credentials.cache((None, b"key"), Principal(kind="api_key", id="key"))
    credentials.forget_lease("lease 1")
    credentials.forget_lease("lease 1")
    credentials.forget_lease("another process made it")
    kept = [*((b"Bearer %d" % n, None) for n in range(3)), (b"bearer 1", None), (None, b"key")]
    assert [credentials.cached(headers) is not None for headers in kept] == [True, False, True, False, True]
    credentials.forget(lambda caller: caller.kind == "agent")
    assert [credentials.cached(headers) is not None for headers in kept] == [False, False, False, False, True]
