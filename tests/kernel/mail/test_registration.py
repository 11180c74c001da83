"""Making an account: open, by invitation, with proof of the address; and moving one to another address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer, token_of

from corral import clock
from corral.testing.kit import PASSWORD, Answer, Client, Kit

pytestmark = pytest.mark.one_engine

OPEN = {"settings.security.registration": "open"}


def registration(email: str = "ada@example.org", **more: Any) -> dict[str, Any]:
    return {"email": email, "password": PASSWORD, "full_name": "Ada", **more}


async def register(kit: Kit, email: str = "ada@example.org", **more: Any) -> Answer:
    answer = await kit.client.post("/auth/register", registration(email, **more))
    await kit.run_jobs()
    return answer


async def verify(kit: Kit, token: str) -> Answer:
    return await kit.client.post("/auth/verify-email", {"token": token})


@pytest.fixture
async def proving(make_kit: Callable[..., Any], mail_server: MailServer) -> Kit:
    """A kernel that wants addresses verified, with an admin."""
    config = mail_server.config() | OPEN | {"settings.security.email_verification": True}
    kit: Kit = await make_kit(plugins=("admin",), config=config)
    await kit.as_user("admin", "admin@example.org")
    return kit


# -- proof of the address


async def test_an_account_opens_with_the_link_in_the_mail(proving: Kit, mail_server: MailServer) -> None:
    answer = await register(proving)
    assert (answer.status, answer.json()) == (202, {"status": "verification_sent"})
    login = {"email": "ada@example.org", "password": PASSWORD}
    assert (await proving.client.post("/auth/login", login)).code == "email_unverified"
    assert (await proving.client.post("/auth/login", {**login, "password": "wrong"})).code == "invalid_credentials"
    token = mail_server.box.token("ada@example.org")
    verified = await verify(proving, token)
    assert (verified.status, verified.json()["email_verified"]) == (200, True)
    assert (await verify(proving, token)).code == "link_expired"
    await proving.sign_in("ada@example.org")


async def test_a_taken_address_answers_as_a_new_one_and_its_owner_hears(proving: Kit, mail_server: MailServer) -> None:
    new, taken = await register(proving), await register(proving, "ADMIN@example.org")
    assert (taken.status, taken.body) == (new.status, new.body)
    assert taken.headers.keys() == new.headers.keys()
    [mail] = mail_server.box.to("admin@example.org")
    assert "already has an account" in mail.get_content()
    assert (await proving.client.post("/auth/login", registration("admin@example.org"))).status == 422
    await proving.sign_in("admin@example.org")


async def test_of_two_who_register_an_address_its_holder_chooses_the_password(
    proving: Kit, mail_server: MailServer
) -> None:
    passwords = ("the phrase of one of them", "what the other one typed", "the phrase of the one who reads mail")
    for password in passwords[:2]:
        assert (await register(proving, password=password)).status == 202
    verifying, choosing = [token_of(mail.get_content()) for mail in mail_server.box.to("ada@example.org")]
    assert (await verify(proving, verifying)).code == "link_expired"
    again = await register(proving, password=passwords[0])
    assert (again.status, len(mail_server.box.to("ada@example.org"))) == (202, 3)
    body = {"token": choosing, "new_password": passwords[2]}
    done = await proving.client.post("/auth/reset-password", body)
    assert (done.status, done.json()["user"]["email_verified"]) == (200, True)
    for password in passwords[:2]:
        login = {"email": "ada@example.org", "password": password}
        assert (await proving.client.post("/auth/login", login)).code == "invalid_credentials"
    await proving.sign_in("ada@example.org", passwords[2])


async def test_the_link_on_demand_leads_whom_no_password_is_left_to_a_new_one(
    proving: Kit, mail_server: MailServer
) -> None:
    for _ in range(2):
        await register(proving)
    await proving.client.post("/auth/verify-email/resend", {"email": "ada@example.org"})
    await proving.run_jobs()
    body = {"token": mail_server.box.token("ada@example.org"), "new_password": "another rather long phrase"}
    assert (await proving.client.post("/auth/reset-password", body)).json()["user"]["email_verified"] is True


async def test_registering_again_takes_nothing_from_whoever_has_signed_in(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit: Kit = await make_kit(plugins=("admin", "settings"), config=mail_server.config() | OPEN)
    admin = await kit.as_user("admin")
    await register(kit)
    ada = await kit.sign_in("ada@example.org")
    on = await admin.put("/settings/bulk", {"settings": {"security.email_verification": True}})
    assert on.status == 200, on
    assert (await register(kit, password="the phrase of somebody else")).status == 202
    assert (await ada.get("/auth/me")).status == 200
    assert (await verify(kit, mail_server.box.token("ada@example.org"))).status == 200
    await kit.sign_in("ada@example.org")


async def test_the_link_is_sent_again_on_demand(proving: Kit, mail_server: MailServer) -> None:
    await register(proving)
    clock.travel(25 * 3600)
    assert (await verify(proving, mail_server.box.token("ada@example.org"))).code == "link_expired"
    for email in ("ada@example.org", "nobody@example.org", "admin@example.org"):
        answer = await proving.client.post("/auth/verify-email/resend", {"email": email})
        assert (answer.status, answer.json()) == (202, {"status": "accepted"})
    await proving.run_jobs()
    assert len(mail_server.box.mails) == 2
    assert (await verify(proving, mail_server.box.token("ada@example.org"))).status == 200


async def test_accounts_of_admins_and_the_first_one_need_no_proof(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    config = mail_server.config() | OPEN | {"settings.security.email_verification": True}
    kit: Kit = await make_kit(plugins=("admin",), config=config)
    first = await register(kit, "first@example.org")
    assert (first.status, first.json()["role"]) == (201, "admin")
    admin = await kit.sign_in("first@example.org")
    made = await admin.post("/admin/users", registration("made@example.org"))
    assert made.status == 201
    await kit.sign_in("made@example.org")
    assert mail_server.box.mails == []


async def test_without_verification_a_taken_address_is_a_conflict(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit: Kit = await make_kit(plugins=("admin",), config=mail_server.config() | OPEN)
    await kit.as_user("admin")
    assert (await register(kit)).status == 201
    again = await register(kit, "ADA@example.org")
    assert (again.status, again.code) == (409, "duplicate")
    assert "existing_id" not in again.json()
    assert mail_server.box.mails == []


async def test_a_mail_that_resets_the_password_proves_the_address_too(proving: Kit, mail_server: MailServer) -> None:
    await register(proving)
    await proving.client.post("/auth/forgot-password", {"email": "ada@example.org"})
    await proving.run_jobs()
    body = {"token": mail_server.box.token("ada@example.org"), "new_password": "another rather long phrase"}
    done = await proving.client.post("/auth/reset-password", body)
    assert (done.status, done.json()["user"]["email_verified"]) == (200, True)


# -- another address


async def move(client: Client, email: str, **more: Any) -> Answer:
    return await client.put("/auth/me", {"email": email, "current_password": PASSWORD, **more})


async def test_another_address_takes_effect_once_it_is_verified(proving: Kit, mail_server: MailServer) -> None:
    ada = await proving.as_user("member", "ada@example.org")
    assert (await ada.put("/auth/me", {"email": "new@example.org"})).code == "reauth_required"
    assert (await move(ada, "admin@example.org")).code == "duplicate"
    asked = await move(ada, "New@example.org", full_name="Countess")
    assert (asked.status, asked.json()["email"], asked.json()["full_name"]) == (200, "ada@example.org", "Countess")
    await proving.run_jobs()
    assert [str(mail["To"]) for mail in mail_server.box.mails] == ["New@example.org"]
    done = await verify(proving, mail_server.box.token("New@example.org"))
    assert (done.status, done.json()["email"], done.json()["email_verified"]) == (200, "New@example.org", True)
    await proving.run_jobs()
    [told] = mail_server.box.to("ada@example.org")
    assert "New@example.org" in told.get_content()
    await proving.sign_in("new@example.org")
    assert (await proving.client.post("/auth/login", {"email": "ada@example.org", "password": PASSWORD})).status == 401


@pytest.mark.parametrize("how", ["change", "forgotten", "admin"])
async def test_a_move_that_waits_ends_with_the_password(how: str, proving: Kit, mail_server: MailServer) -> None:
    ada, admin = await proving.as_user("member", "ada@example.org"), await proving.sign_in("admin@example.org")
    assert (await move(ada, "thief@example.org")).status == 200
    await proving.run_jobs()
    token = mail_server.box.token("thief@example.org")
    new = "another rather long phrase"
    if how == "change":
        answer = await ada.post("/auth/change-password", {"current_password": PASSWORD, "new_password": new})
    elif how == "forgotten":
        await proving.client.post("/auth/forgot-password", {"email": "ada@example.org"})
        await proving.run_jobs()
        body = {"token": mail_server.box.token("ada@example.org"), "new_password": new}
        answer = await proving.client.post("/auth/reset-password", body)
    else:
        answer = await admin.post(f"/admin/users/{ada.user['id']}/reset-password")
    assert answer.status == 200, answer
    assert (await verify(proving, token)).code == "link_expired"


async def test_of_two_that_want_an_address_one_gets_it(proving: Kit, mail_server: MailServer) -> None:
    people = [await proving.as_user() for _ in range(2)]
    for person in people:
        assert (await move(person, "new@example.org")).status == 200
    await proving.run_jobs()
    tokens = [token_of(mail.get_content()) for mail in mail_server.box.to("new@example.org")]
    answers = await asyncio.gather(*[verify(proving, token) for token in tokens])
    assert sorted(answer.status for answer in answers) == [200, 409]
    assert {answer.code for answer in answers} == {None, "duplicate"}


async def test_without_verification_it_takes_effect_at_once(mailing: Kit, mail_server: MailServer) -> None:
    ada = await mailing.as_user("member", "ada@example.org")
    await mailing.client.post("/auth/forgot-password", {"email": "ada@example.org"})
    await mailing.run_jobs()
    old_link = mail_server.box.token("ada@example.org")
    moved = await move(ada, "new@example.org")
    assert (moved.json()["email"], moved.json()["email_verified"]) == ("new@example.org", False)
    await mailing.run_jobs()
    assert "new@example.org" in mail_server.box.to("ada@example.org")[-1].get_content()
    body = {"token": old_link, "new_password": "another rather long phrase"}
    assert (await mailing.client.post("/auth/reset-password", body)).code == "link_expired"


# -- modes and invitations


async def moded(make_kit: Callable[..., Any], mail_server: MailServer, mode: str) -> tuple[Kit, Client]:
    config = mail_server.config() | {"settings.security.registration": mode}
    kit: Kit = await make_kit(plugins=("admin",), config=config)
    return kit, await kit.as_user("admin")


@pytest.mark.parametrize("mode", ["invite", "closed"])
async def test_registration_may_be_closed(mode: str, make_kit: Callable[..., Any], mail_server: MailServer) -> None:
    kit, admin = await moded(make_kit, mail_server, mode)
    assert (await register(kit)).code == "registration_closed"
    assert (await kit.client.get("/auth/config")).json()["registration"] == mode
    invited = await admin.post("/admin/invitations", {"email": "ada@example.org"})
    assert invited.status == 201, invited
    answer = await register(kit, invitation_token=token_of(invited.json()["url"]))
    assert answer.status == (201 if mode == "invite" else 403)


async def test_admin_6_an_invitation_works_once_and_gives_its_role(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit, admin = await moded(make_kit, mail_server, "invite")
    made = await admin.post("/admin/invitations", {"email": "Ada@example.org", "role": "auditor"})
    assert made.status == 201, made
    assert {"email": "Ada@example.org", "role": "auditor", "status": "pending"}.items() <= made.json().items()
    assert made.headers["location"].endswith(made.json()["id"])
    assert (await admin.post("/admin/invitations", {"email": "ada@EXAMPLE.org"})).code == "duplicate"
    await kit.run_jobs()
    mailed = mail_server.box.token("Ada@example.org")
    token = token_of(made.json()["url"])
    other = await register(kit, "eve@example.org", invitation_token=token)
    assert (other.status, other.json()["errors"][0]["pointer"]) == (422, "/email")
    answers = await asyncio.gather(*[register(kit, invitation_token=each) for each in (token, mailed, token)])
    assert sorted(answer.status for answer in answers) in ([201, 409, 409], [201, 409, 410], [201, 410, 410])
    ada = await kit.sign_in("ada@example.org")
    assert (ada.user["role"], ada.user["email_verified"]) == ("auditor", True)
    assert (await register(kit, "ada@example.org", invitation_token=mailed)).code == "link_expired"
    [shown] = (await admin.get("/admin/invitations")).json()["items"]
    assert shown["status"] == "accepted"
    assert "url" not in shown
    assert (await admin.post("/admin/invitations", {"email": "ada@example.org"})).code == "duplicate"
    kinds = {event.type: event.payload() for event in await kit.events() if event.type.startswith("invitation.")}
    expected = {"invitation_id": made.json()["id"], "role": "auditor"}
    assert kinds == {"invitation.created": expected, "invitation.accepted": expected}


async def test_admin_6_an_invitation_is_dead_after_seven_days(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit, admin = await moded(make_kit, mail_server, "invite")
    made = (await admin.post("/admin/invitations", {"email": "ada@example.org"})).json()
    clock.travel(7 * 86_400 + 1)
    late = await register(kit, invitation_token=token_of(made["url"]))
    assert (late.status, late.code) == (410, "link_expired")
    admin = await kit.sign_in(admin.user["email"])
    [shown] = (await admin.get("/admin/invitations")).json()["items"]
    assert shown["status"] == "expired"
    assert (await admin.delete(f"/admin/invitations/{made['id']}")).status == 404
    again = await admin.post("/admin/invitations", {"email": "ada@example.org"})
    assert again.status == 201
    assert (await register(kit, invitation_token=token_of(again.json()["url"]))).status == 201


async def test_admin_6_an_invitation_is_dead_after_revocation(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit, admin = await moded(make_kit, mail_server, "invite")
    made = (await admin.post("/admin/invitations", {"email": "ada@example.org"})).json()
    path = f"/admin/invitations/{made['id']}"
    assert (await admin.delete(path)).status == 204
    assert (await admin.delete(path)).status == 404
    await kit.run_jobs()
    assert mail_server.box.mails == []  # it had not left yet
    gone = await register(kit, invitation_token=token_of(made["url"]))
    assert (gone.status, gone.code) == (410, "link_expired")


async def test_an_invitation_needs_no_further_proof(proving: Kit, mail_server: MailServer) -> None:
    admin = await proving.sign_in("admin@example.org")
    made = (await admin.post("/admin/invitations", {"email": "ada@example.org", "role": "viewer"})).json()
    assert (await register(proving, invitation_token=token_of(made["url"]))).status == 201
    assert (await proving.sign_in("ada@example.org")).user["role"] == "viewer"
