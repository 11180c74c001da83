"""Getting back in by a link: the same answer for every address, once, and nothing round the second factor."""

from __future__ import annotations

import asyncio
import functools
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer, token_of

from corral import clock
from corral.ids import new_id
from corral.jobs.job import JobRow
from corral.testing.kit import PASSWORD, Answer, Kit
from corral_core.accounts.api import Accounts, UserPatch
from corral_core.accounts.models import InvitationRow, LinkRow

pytestmark = pytest.mark.one_engine

NEW = "another rather long phrase"


async def forgot(kit: Kit, email: str) -> Answer:
    answer = await kit.client.post("/auth/forgot-password", {"email": email})
    await kit.run_jobs()
    return answer


async def reset(kit: Kit, token: str, password: str = NEW, **more: Any) -> Answer:
    return await kit.client.post("/auth/reset-password", {"token": token, "new_password": password, **more})


async def test_a_link_resets_the_password_and_signs_in(mailing: Kit, mail_server: MailServer) -> None:
    ada = await mailing.as_user("member", "ada@example.org")
    answer = await forgot(mailing, "ADA@Example.org")
    assert answer.status == 202
    token = mail_server.box.token("ada@example.org")
    assert "https://corral.example/account/reset-password#token=" in mail_server.box.mails[0].get_content()
    weak = await reset(mailing, token, "short")
    assert (weak.status, weak.code) == (422, "weak_password")
    done = await reset(mailing, token)
    assert done.status == 200, done
    assert done.json()["user"]["email"] == "ada@example.org"
    assert (await ada.get("/auth/me")).code == "session_revoked"
    ada.token = done.json()["access_token"]
    assert (await ada.get("/auth/me")).status == 200
    assert (await mailing.client.post("/auth/login", {"email": "ada@example.org", "password": PASSWORD})).status == 401
    await mailing.sign_in("ada@example.org", NEW)
    again = await reset(mailing, token)
    assert (again.status, again.code) == (410, "link_expired")
    await mailing.run_jobs()
    assert "password was changed" in str(mail_server.box.to("ada@example.org")[-1]["Subject"])


async def test_the_cookie_form_keeps_the_token_out_of_the_body(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", "ada@example.org")
    await forgot(mailing, "ada@example.org")
    done = await reset(mailing, mail_server.box.token("ada@example.org"), cookie=True)
    assert "refresh_token" not in done.json()
    assert "corral_refresh=" in done.headers["set-cookie"]


async def test_one_link_ends_the_others_and_a_lock(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", "ada@example.org")
    for _ in range(2):
        await forgot(mailing, "ada@example.org")
    first, second = (token_of(mail.get_content()) for mail in mail_server.box.to("ada@example.org"))
    for _ in range(5):
        await mailing.client.post("/auth/login", {"email": "ada@example.org", "password": "wrong"})
    locked = await mailing.client.post("/auth/login", {"email": "ada@example.org", "password": PASSWORD})
    assert locked.code == "account_locked"
    assert (await reset(mailing, second)).status == 200
    assert (await reset(mailing, first)).code == "link_expired"
    await mailing.sign_in("ada@example.org", NEW)


async def test_links_end_after_half_an_hour(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", "ada@example.org")
    await forgot(mailing, "ada@example.org")
    clock.travel(30 * 60 + 1)
    assert (await reset(mailing, mail_server.box.token("ada@example.org"))).code == "link_expired"


async def test_a_link_for_whom_an_admin_took_the_password_ends_as_early(mailing: Kit, mail_server: MailServer) -> None:
    admin, ada = await mailing.as_user("admin"), await mailing.as_user("member", "ada@example.org")
    await admin.post(f"/admin/users/{ada.user['id']}/reset-password")
    await forgot(mailing, "ada@example.org")
    clock.travel(30 * 60 + 1)
    assert (await reset(mailing, mail_server.box.token("ada@example.org"))).code == "link_expired"


async def test_a_password_that_an_admin_took_is_a_former_one(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=("admin",), config={"settings.password.history": 5})
    admin, ada = await kit.as_user("admin"), await kit.as_user("member", "ada@example.org")
    url = (await admin.post(f"/admin/users/{ada.user['id']}/reset-password")).json()["reset_url"]
    again = await reset(kit, token_of(url), PASSWORD)
    assert (again.status, again.code) == (422, "weak_password")
    assert (await reset(kit, token_of(url))).status == 200


async def test_a_change_of_the_password_ends_links_to_another_one(mailing: Kit, mail_server: MailServer) -> None:
    ada = await mailing.as_user("member", "ada@example.org")
    await forgot(mailing, "ada@example.org")
    changed = await ada.post("/auth/change-password", {"current_password": PASSWORD, "new_password": NEW})
    assert changed.status == 200, changed
    assert (await reset(mailing, mail_server.box.token("ada@example.org"))).code == "link_expired"


async def test_the_time_of_a_link_begins_when_its_mail_leaves(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", "ada@example.org")
    mail_server.stop()
    await forgot(mailing, "ada@example.org")
    clock.travel(2 * 3600)
    mail_server.start()
    await mailing.run_jobs()
    assert (await reset(mailing, mail_server.box.token("ada@example.org"))).status == 200


async def test_at_most_three_links_are_live(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", "ada@example.org")
    await asyncio.gather(
        *[mailing.client.post("/auth/forgot-password", {"email": "ada@example.org"}) for _ in range(8)]
    )
    await mailing.run_jobs()
    assert len(mail_server.box.mails) == 3
    clock.travel(31 * 60)
    await forgot(mailing, "ada@example.org")
    assert len(mail_server.box.mails) == 4


async def test_nobody_learns_who_has_an_account(mailing: Kit, mail_server: MailServer) -> None:
    admin = await mailing.as_user("admin")
    off = await mailing.as_user("member", "off@example.org")
    await admin.patch(f"/admin/users/{off.user['id']}", {"is_active": False})
    known = await mailing.client.post("/auth/forgot-password", {"email": admin.user["email"]})
    for email in ("nobody@example.org", "off@example.org", "not an address"):
        answer = await mailing.client.post("/auth/forgot-password", {"email": email})
        assert (answer.status, answer.body) == (known.status, known.body) == (202, b'{"status":"accepted"}')
        assert answer.headers.keys() == known.headers.keys()
    await mailing.run_jobs()
    assert [str(mail["To"]) for mail in mail_server.box.mails] == [admin.user["email"]]


async def test_the_answer_takes_as_long_for_any_address(mailing: Kit) -> None:
    """Both do the same: they write one job. Times are compared roughly, for the sake of busy machines."""
    await mailing.as_user("member", "ada@example.org")
    times: dict[str, list[float]] = {"ada@example.org": [], "nobody@example.org": []}
    for _ in range(60):
        for email, taken in times.items():
            began = time.perf_counter()
            await mailing.client.post("/auth/forgot-password", {"email": email})
            taken.append(time.perf_counter() - began)
    known, unknown = (statistics.median(taken) for taken in times.values())
    assert abs(known - unknown) < 0.5 * max(known, unknown), (known, unknown)


async def test_without_a_mail_service_the_answer_is_the_same_and_an_admin_has_the_link(
    make_kit: Callable[..., Any],
) -> None:
    kit: Kit = await make_kit(plugins=("admin",))
    admin, ada = await kit.as_user("admin"), await kit.as_user("member", "ada@example.org")
    assert (await forgot(kit, "ada@example.org")).status == 202
    issued = await admin.post(f"/admin/users/{ada.user['id']}/reset-password")
    assert issued.status == 200, issued
    assert issued.json()["reset_url"].startswith("http://127.0.0.1:8000/account/reset-password#token=")
    assert (await ada.get("/auth/me")).code == "session_revoked"
    assert (await kit.client.post("/auth/login", {"email": "ada@example.org", "password": PASSWORD})).status == 401
    assert (await reset(kit, token_of(issued.json()["reset_url"]))).status == 200


async def test_no_token_is_found_in_the_database(mailing: Kit, mail_server: MailServer) -> None:
    admin, ada = await mailing.as_user("admin"), await mailing.as_user("member", "ada@example.org")
    await forgot(mailing, "ada@example.org")
    url = (await admin.post(f"/admin/users/{ada.user['id']}/reset-password")).json()["reset_url"]
    await mailing.run_jobs()
    tokens = [mail_server.box.token("ada@example.org"), token_of(url)]

    def stored() -> str:
        rows = [*LinkRow.select().dicts(), *JobRow.select().dicts()]
        return "\n".join(map(repr, rows))

    text = await mailing.kernel.database.work(stored, read=True)
    text += "\n".join(repr(event) for event in await mailing.events())
    for token in tokens:
        assert len(token) == 43
        assert token not in text


async def test_a_purge_leaves_no_address_in_links_and_mails(mailing: Kit, mail_server: MailServer) -> None:
    admin, other = await mailing.as_user("admin"), await mailing.as_user("member", "other@example.org")
    invited = await admin.post("/admin/invitations", {"email": "Zoë@Example.org"})
    facts = {"email": "Zoë@Example.org", "password": PASSWORD, "full_name": "Zoë"}
    token = token_of(invited.json()["url"])
    made = await mailing.client.post("/auth/register", {**facts, "invitation_token": token})
    assert made.status == 201, made
    await mailing.run_jobs()
    for spelling in ("zoë@example.org", "ZOË@EXAMPLE.ORG", "other@example.org"):
        await forgot(mailing, spelling)
    assert (await admin.patch(f"/admin/users/{made.json()['id']}", {"is_active": False})).status == 200
    accounts: Any = mailing.kernel.container.get(Accounts)
    await mailing.kernel.database.work(lambda: accounts.purge(made.json()["id"]))

    def stored() -> str:
        rows = [*LinkRow.select().dicts(), *JobRow.select().dicts(), *InvitationRow.select().dicts()]
        return "\n".join(map(repr, rows)).casefold()

    text = await mailing.kernel.database.work(stored, read=True)
    assert "zoë" not in text
    assert "other@example.org" in text
    await mailing.run_jobs()
    assert mail_server.box.token(other.user["email"])


async def test_a_purge_reads_the_mails_that_are_kept_page_by_page(mailing: Kit) -> None:
    ada = await mailing.as_user("member", "ada@example.org")
    kept = {"name": "accounts.send_mail", "state": "done", "run_at": clock.now(), "created_at": clock.now()}

    def fill(address: str) -> None:
        arguments = {"to": address, "facts": {"text": "x" * 4000}}
        JobRow.insert_many([{"id": new_id(), "arguments": arguments, **kept} for _ in range(500)]).execute()

    work = mailing.kernel.database.work
    for address in ("other@example.org",) * 3 + ("ADA@example.org",):
        await work(functools.partial(fill, address))
    accounts: Any = mailing.kernel.container.get(Accounts)
    await work(lambda: accounts.update(ada.user["id"], UserPatch(is_active=False)))
    tracemalloc.start()
    try:
        await work(lambda: accounts.purge(ada.user["id"]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    left = await work(lambda: [row.arguments["to"] for row in JobRow.select() if "text" in row.arguments["facts"]])
    assert left == ["other@example.org"] * 1500
    assert peak < 6 * 1024 * 1024, peak  # all of them together are 8 MB as text, and as much again once parsed


async def test_tokens_of_other_kinds_open_nothing(mailing: Kit, mail_server: MailServer) -> None:
    admin = await mailing.as_user("admin")
    made = await admin.post("/admin/invitations", {"email": "eve@example.org"})
    token = token_of(made.json()["url"])
    assert (await reset(mailing, token)).code == "link_expired"
    assert (await mailing.client.post("/auth/verify-email", {"token": token})).code == "link_expired"
    assert (await reset(mailing, "x" * 43)).code == "link_expired"


async def test_a_link_is_used_once_however_many_try(mailing: Kit, mail_server: MailServer) -> None:
    await mailing.as_user("member", "ada@example.org")
    await forgot(mailing, "ada@example.org")
    token = mail_server.box.token("ada@example.org")
    answers = await asyncio.gather(*[reset(mailing, token, f"{NEW} {number}") for number in range(6)])
    assert sorted(answer.status for answer in answers) == [200, 410, 410, 410, 410, 410]


async def test_the_second_factor_is_still_asked_for(mailing: Kit, mail_server: MailServer) -> None:
    ada = await mailing.as_user("member", "ada@example.org")
    setup = await ada.post("/auth/mfa/setup", {"password": PASSWORD})
    assert setup.status == 200, setup
    on = await ada.post("/auth/mfa/verify", {"code": totp(setup.json()["secret"])})
    assert on.status == 200, on
    await forgot(mailing, "ada@example.org")
    answer = await reset(mailing, mail_server.box.token("ada@example.org"))
    assert (answer.status, answer.json()["mfa_required"]) == (200, True)
    assert "access_token" not in answer.json()
    clock.travel(60)
    challenge = {"mfa_token": answer.json()["mfa_token"], "code": totp(setup.json()["secret"])}
    assert (await mailing.client.post("/auth/mfa/challenge", challenge)).status == 200


async def test_a_deactivated_account_has_no_way_back(mailing: Kit, mail_server: MailServer) -> None:
    admin, ada = await mailing.as_user("admin"), await mailing.as_user("member", "ada@example.org")
    await forgot(mailing, "ada@example.org")
    await admin.patch(f"/admin/users/{ada.user['id']}", {"is_active": False})
    assert (await reset(mailing, mail_server.box.token("ada@example.org"))).code == "link_expired"


@pytest.mark.parametrize("body", [{}, {"email": 7}, {"email": "a@b.c", "more": 1}])
async def test_bad_bodies_are_refused(body: Any, mailing: Kit) -> None:
    assert (await mailing.client.post("/auth/forgot-password", body)).status == 422


def totp(secret: str) -> str:
    """RFC 6238, for the time of the kernel's clock."""
    import base64
    import hashlib
    import hmac

    digest = hmac.digest(base64.b32decode(secret), int(clock.time_s() // 30).to_bytes(8, "big"), hashlib.sha1)
    offset = digest[-1] & 15
    return f"{(int.from_bytes(digest[offset : offset + 4], 'big') & 0x7FFFFFFF) % 1_000_000:06d}"
