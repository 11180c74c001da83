"""The second factor: asked for on every way in, each code accepted once, and no way round it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from corral import clock
from corral.testing.kit import PASSWORD, Kit
from corral_core.accounts.api import AccountRecovery, Accounts
from corral_core.accounts.models import ChallengeRow, RecoveryCodeRow, SecondFactorRow, UserRow

MakeKit = Callable[..., Awaitable[Kit]]


async def _types(kit: Kit) -> list[str]:
    return [each.type for each in await kit.events()]


async def test_setup_shows_the_seed_once_and_counts_only_with_its_first_code(kit: Kit, door: Any) -> None:
    client = await kit.as_user(email="ann@example.org")
    setup = (await client.post("/auth/mfa/setup")).json()
    assert setup["qr_code"].startswith("data:image/svg+xml")
    uri = urlsplit(setup["otpauth_uri"])
    assert (uri.scheme, uri.netloc, unquote(uri.path)) == ("otpauth", "totp", "/Corral:ann@example.org")
    assert parse_qs(uri.query) == {"secret": [setup["secret"]], "issuer": ["Corral"]}
    assert (await door.login("ann@example.org")).status == 200  # not in force yet
    assert not (await client.get("/auth/me")).json()["mfa_enabled"]
    app = type((await door.with_mfa())[1])(setup["secret"])
    wrong = await client.post("/auth/mfa/verify", {"code": app.wrong()})
    assert (wrong.status, wrong.code) == (401, "invalid_credentials")
    on = await client.post("/auth/mfa/verify", {"token": app.code()})
    assert (on.status, on.json()["mfa_enabled"], len({*on.json()["recovery_codes"]})) == (200, True, 10)
    me = (await client.get("/auth/me")).json()
    assert (me["mfa_enabled"], me["session"]["mfa"]) == (True, True)
    assert (await client.post("/auth/mfa/setup")).code == "invalid_state"
    assert (await client.post("/auth/mfa/verify", {"code": app.code(1)})).code == "invalid_state"
    rows = await kit.kernel.database.work(
        lambda: str([*SecondFactorRow.select().dicts(), *RecoveryCodeRow.select().dicts()]), read=True
    )
    for shown in (setup["secret"], *on.json()["recovery_codes"]):
        assert shown not in rows
        assert shown.replace("-", "") not in rows
    assert (await _types(kit)).count("mfa.enabled") == 2


async def test_auth_5_a_code_works_once_and_the_activation_code_has_been_used(kit: Kit, door: Any) -> None:
    client, app, codes = await door.with_mfa(email="ann@example.org")
    assert (await door.login("ann@example.org", mfa_code=app.code())).code == "invalid_credentials"
    clock.travel(30)
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    code = app.code()
    done = await door.challenge(token, code=code)
    assert done.status == 200, done
    assert (await door.client(done).get("/auth/me")).json()["session"]["mfa"]
    for again in (
        await door.challenge(token, code=app.code(1)),  # the token is used up as well
        await door.challenge((await door.login("ann@example.org")).json()["mfa_token"], code=code),
        await door.login("ann@example.org", mfa_code=code),
        await client.post("/auth/reauth", {"code": code}),
    ):
        assert again.status == 401, again
    assert (await client.post("/auth/reauth", {"code": app.code(1)})).status == 200
    # an older step than the newest that was accepted is refused too
    assert (await client.post("/auth/mfa/disable", {"password": PASSWORD, "code": code})).status == 401
    clock.travel(1000)
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    spelled = codes[0].upper().replace("-", " ")
    assert (await door.challenge(token, recovery_code=spelled)).status == 200
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    assert (await door.challenge(token, recovery_code=codes[0])).code == "invalid_credentials"
    assert (await door.challenge(token, recovery_code=codes[1])).status == 200


async def test_auth_5_of_parallel_sign_ins_with_one_code_one_succeeds(kit: Kit, door: Any) -> None:
    _, app, codes = await door.with_mfa(email="ann@example.org")
    clock.travel(60)
    code = app.code()
    tokens = [(await door.login("ann@example.org")).json()["mfa_token"] for _ in range(4)]
    answers = await asyncio.gather(*[door.challenge(token, code=code) for token in tokens])
    assert sorted(each.status for each in answers) == [200, 401, 401, 401]
    answers = await asyncio.gather(
        *[
            door.challenge((await door.login("ann@example.org")).json()["mfa_token"], recovery_code=codes[3])
            for _ in "ab"
        ]
    )
    assert sorted(each.status for each in answers) == [200, 401]


@pytest.mark.one_engine
@pytest.mark.parametrize("code", ["12345", "1234567", " 123456", "123 456", "123456\n", "１２３４５６", "abcdef"])
async def test_a_code_has_six_digits_as_sent(kit: Kit, door: Any, code: str) -> None:
    client = await kit.as_user()
    assert (await door.login(client.user["email"], mfa_code=code)).status == 422
    assert (await client.post("/auth/mfa/verify", {"code": code})).status == 422


@pytest.mark.one_engine
async def test_recovery_codes_have_112_bits_and_a_new_set_kills_the_old_one(kit: Kit, door: Any) -> None:
    client, app, codes = await door.with_mfa(email="ann@example.org")
    assert all(len(code.replace("-", "")) * 5 >= 112 for code in codes)
    clock.travel(60)
    wrong = await client.post("/auth/mfa/recovery-codes", {"password": "an entirely other phrase", "code": app.code()})
    assert wrong.code == "invalid_credentials"
    renewed = await client.post("/auth/mfa/recovery-codes", {"password": PASSWORD, "code": app.code()})
    assert (renewed.status, len({*renewed.json()["recovery_codes"]} - {*codes})) == (200, 10)
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    assert (await door.challenge(token, recovery_code=codes[0])).status == 401
    for code in renewed.json()["recovery_codes"]:  # the codes shown are the codes stored
        token = (await door.login("ann@example.org")).json()["mfa_token"]
        assert (await door.challenge(token, recovery_code=code)).status == 200


async def test_five_wrong_codes_end_the_mfa_token_and_lock(make_kit: MakeKit, open_door: Any) -> None:
    kit = await make_kit(plugins=[], config={"settings.security.lockout_threshold": 8})
    door = open_door(kit)
    _, app, _ = await door.with_mfa(email="ann@example.org")
    clock.travel(60)
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    answers = await asyncio.gather(*[door.challenge(token, code=app.wrong()) for _ in range(7)])
    assert sorted(each.code for each in answers) == ["invalid_credentials"] * 5 + ["token_expired"] * 2
    assert (await door.challenge(token, code=app.code())).code == "token_expired"
    for _ in range(3):  # a right password alone does not make up for wrong codes
        token = (await door.login("ann@example.org")).json()["mfa_token"]
        assert (await door.challenge(token, code=app.wrong())).code == "invalid_credentials"
    assert (await door.challenge(token, code=app.code())).code == "account_locked"
    assert (await door.login("ann@example.org")).code == "account_locked"


@pytest.mark.one_engine
async def test_an_mfa_token_opens_nothing_else_and_lasts_five_minutes(kit: Kit, door: Any) -> None:
    _, app, _ = await door.with_mfa(email="ann@example.org")
    pending = (await door.login("ann@example.org")).json()
    assert (pending["mfa_required"], pending["expires_in"]) == (True, 300)
    assert {"access_token", "refresh_token", "user"}.isdisjoint(pending)
    assert (await kit.client.post("/auth/refresh", {"refresh_token": pending["mfa_token"]})).status == 401
    for header in ({"Authorization": f"Bearer {pending['mfa_token']}"}, {"X-API-Key": pending["mfa_token"]}):
        assert (await kit.client.get("/auth/me", headers=header)).status == 401
    clock.travel(301)
    assert (await door.challenge(pending["mfa_token"], code=app.code())).code == "token_expired"


async def test_a_setup_lasts_15_minutes_and_a_new_one_replaces_it(kit: Kit, door: Any) -> None:
    app_of = type((await door.with_mfa())[1])
    client = await kit.as_user(email="ann@example.org")
    first = (await client.post("/auth/mfa/setup")).json()["secret"]
    second = (await client.post("/auth/mfa/setup")).json()["secret"]
    assert (await client.post("/auth/mfa/verify", {"code": app_of(first).code()})).code == "invalid_credentials"
    clock.travel(901)
    client = await kit.sign_in("ann@example.org")
    assert (await client.post("/auth/mfa/verify", {"code": app_of(second).code()})).code == "invalid_state"


@pytest.mark.one_engine
async def test_setup_needs_a_fresh_sign_in_the_password_or_a_step_up(kit: Kit, door: Any) -> None:
    client = await kit.as_user()
    clock.travel(301)
    assert (await client.post("/auth/mfa/setup")).code == "reauth_required"
    assert (
        await client.post("/auth/mfa/setup", {"password": "an entirely other phrase"})
    ).code == "invalid_credentials"
    assert (await client.post("/auth/mfa/setup", {"password": PASSWORD})).status == 200
    assert (await client.post("/auth/mfa/setup")).code == "reauth_required"
    assert (await client.post("/auth/reauth", {"password": PASSWORD})).status == 200
    assert (await client.post("/auth/mfa/setup")).status == 200


@pytest.mark.one_engine
async def test_disabling_needs_both_factors_and_that_the_policy_allows_it(make_kit: MakeKit, open_door: Any) -> None:
    kit = await make_kit(
        plugins=[], config={"settings.security.require_mfa": True, "settings.security.require_mfa_roles": ["admin"]}
    )
    door = open_door(kit)
    admin, app, _ = await door.with_mfa("admin")
    clock.travel(60)
    refused = await admin.post("/auth/mfa/disable", {"password": PASSWORD, "code": app.code()})
    assert (refused.status, refused.code) == (403, "forbidden")
    member, app, codes = await door.with_mfa("member", "ann@example.org")
    for proof in ({"code": app.wrong()}, {"recovery_code": "a-b-c"}):
        assert (await member.post("/auth/mfa/disable", {"password": PASSWORD, **proof})).code == "invalid_credentials"
    assert (await member.post("/auth/mfa/disable", {"password": PASSWORD})).status == 422
    both = {"password": PASSWORD, "code": app.code(1), "recovery_code": codes[0]}
    assert (await member.post("/auth/mfa/disable", both)).status == 422
    off = await member.post("/auth/mfa/disable", {"password": PASSWORD, "recovery_code": codes[0]})
    assert (off.status, off.json()["mfa_enabled"]) == (200, False)
    assert "access_token" in (await door.login("ann@example.org")).json()
    assert (await member.post("/auth/mfa/disable", {"password": PASSWORD, "code": app.code(1)})).code == "invalid_state"
    assert "mfa.disabled" in await _types(kit)


@pytest.mark.one_engine
async def test_a_new_password_ends_sign_ins_that_wait_for_a_code(kit: Kit, door: Any) -> None:
    client, app, _ = await door.with_mfa(email="ann@example.org")
    clock.travel(60)
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    change = {"current_password": PASSWORD, "new_password": "an entirely other phrase"}
    assert (await client.post("/auth/change-password", change)).status == 200
    assert (await door.challenge(token, code=app.code())).code == "token_expired"


async def test_an_admin_takes_a_lost_second_factor_away(kit: Kit, door: Any) -> None:
    client, _, _ = await door.with_mfa(email="ann@example.org")
    rescue = kit.kernel.container.get(AccountRecovery)
    user = await kit.kernel.database.work(lambda: rescue.reset_mfa(client.user["id"]))
    assert not user.mfa_enabled
    assert (await client.get("/auth/me")).code == "session_revoked"
    assert "access_token" in (await door.login("ann@example.org")).json()


async def test_a_purged_account_leaves_no_second_factor(kit: Kit, door: Any) -> None:
    await kit.as_user("admin")
    client, _, _ = await door.with_mfa(email="ann@example.org")
    await door.login("ann@example.org")
    accounts, work = kit.kernel.container.get(Accounts), kit.kernel.database.work
    await work(lambda: UserRow.update(is_active=False).where(UserRow.id == client.user["id"]).execute())
    await work(lambda: accounts.purge(client.user["id"]))
    left = await work(lambda: [table.select().count() for table in (SecondFactorRow, RecoveryCodeRow, ChallengeRow)])
    assert left == [0, 0, 0]
