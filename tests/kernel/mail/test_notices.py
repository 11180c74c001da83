"""What happens to an account is told to its holder, once."""

from __future__ import annotations

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.kernel.mail.test_recovery import totp

from corral import clock
from corral.testing.kit import PASSWORD, Client, Kit

pytestmark = pytest.mark.one_engine

EMAIL = "ada@example.org"


async def told(kit: Kit, server: MailServer) -> list[str]:
    """The subjects of the mails to ada, oldest first."""
    await kit.run_jobs()
    return [str(mail["Subject"]).removeprefix("Corral: ") for mail in server.box.to(EMAIL)]


async def with_second_factor(kit: Kit) -> tuple[Client, list[str]]:
    ada = await kit.as_user("member", EMAIL)
    seed = (await ada.post("/auth/mfa/setup", {"password": PASSWORD})).json()["secret"]
    on = await ada.post("/auth/mfa/verify", {"code": totp(seed)})
    assert on.status == 200, on
    return ada, on.json()["recovery_codes"]


async def test_one_mail_a_lock(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", EMAIL)
    for _ in range(8):
        await mailing.client.post("/auth/login", {"email": EMAIL, "password": "wrong"})
    assert await told(mailing, mail_server) == ["Your account is temporarily locked"]
    clock.travel(3600)
    for _ in range(8):
        await mailing.client.post("/auth/login", {"email": EMAIL, "password": "wrong"})
    assert len(await told(mailing, mail_server)) == 2
    for _ in range(8):
        await mailing.client.post("/auth/login", {"email": "nobody@example.org", "password": "wrong"})
    await mailing.run_jobs()
    assert len(mail_server.box.mails) == 2


async def test_a_changed_password(mailing: Kit, mail_server: MailServer) -> None:
    ada = await mailing.as_user("member", EMAIL)
    body = {"current_password": PASSWORD, "new_password": "another rather long phrase"}
    assert (await ada.post("/auth/change-password", body)).status == 200
    assert await told(mailing, mail_server) == ["Your password was changed"]


async def test_a_used_recovery_code_says_how_many_are_left(mailing: Kit, mail_server: MailServer) -> None:
    _, codes = await with_second_factor(mailing)
    started = (await mailing.client.post("/auth/login", {"email": EMAIL, "password": PASSWORD})).json()
    proof = {"mfa_token": started["mfa_token"], "recovery_code": codes[0]}
    assert (await mailing.client.post("/auth/mfa/challenge", proof)).status == 200
    assert await told(mailing, mail_server) == ["A recovery code was used"]
    assert "9 codes are left" in mail_server.box.to(EMAIL)[0].get_content()


async def test_a_refresh_token_that_comes_back(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", EMAIL)
    first = (await mailing.client.post("/auth/login", {"email": EMAIL, "password": PASSWORD})).json()["refresh_token"]
    assert (await mailing.client.post("/auth/refresh", {"refresh_token": first})).status == 200
    clock.travel(60)
    for _ in range(2):
        answer = await mailing.client.post("/auth/refresh", {"refresh_token": first})
        assert answer.status == 401, answer
    assert await told(mailing, mail_server) == ["A session was ended for security reasons"]


async def test_a_second_factor_that_an_admin_removed(mailing: Kit, mail_server: MailServer) -> None:
    ada, _ = await with_second_factor(mailing)
    admin = await mailing.as_user("admin")
    await admin.post("/auth/reauth", {"password": PASSWORD})
    removed = await admin.post(f"/admin/users/{ada.user['id']}/reset-mfa")
    assert (removed.status, removed.json()["mfa_enabled"]) == (200, False), removed
    assert (await ada.get("/auth/me")).status == 401
    assert await told(mailing, mail_server) == ["Your second factor was removed"]
    await mailing.sign_in(EMAIL)
