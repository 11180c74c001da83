"""The pages behind mailed links, which work without scripts: their forms, their headers, and where tokens stay."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.limits import stop_refilling

from corral.testing.kit import PASSWORD, Answer, Client, Kit

NEW = "another rather long phrase"


async def submit(client: Client, path: str, **fields: str) -> str:
    """The text of the page that answers a form."""
    sent = {"content-type": "application/x-www-form-urlencoded", "origin": "null"}
    answer = await client.post(path, content=urlencode(fields).encode(), headers=sent, root=True)
    assert answer.status == 200, answer
    check(answer)
    return answer.body.decode()


def check(answer: Answer) -> None:
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["frame-ancestors"], policy["base-uri"]) == ("'none'",) * 3
    assert (policy["script-src"], policy["form-action"]) == ("'self'", "'self'")
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


async def opened(client: Client, url: str, *names: str) -> tuple[str, str]:
    """The path of a link and its token; its page has a form with these fields, none of which holds the token."""
    found = urlsplit(url)
    assert (found.scheme, found.netloc, found.query) == ("https", "corral.example", "")
    answer = await client.get(found.path, root=True)
    assert answer.status == 200, answer
    check(answer)
    page = answer.body.decode()
    assert re.findall(r'<input[^>]* name="(\w+)"', page) == [*names]
    assert '<form method="post">' in page
    assert ("At least 12 characters." in page) == ("password" in "".join(names))
    assets = re.findall(r'(?:href|src)="(.+page\.\w+)"', page)
    assert assets == ["/account/page.css", "/account/page.js"]
    for asset in assets:
        assert (await client.get(asset, root=True)).status == 200
    return found.path, found.fragment.removeprefix("token=")


@pytest.mark.one_engine
async def test_a_person_resets_a_password_in_a_browser(
    mailing: Kit, mail_server: MailServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ada = await mailing.as_user("member", "ada@example.org")
    await mailing.client.post("/auth/forgot-password", {"email": "ada@example.org"})
    await mailing.run_jobs()
    [url] = re.findall(r"https://\S+", mail_server.box.mails[0].get_content().partition("-- ")[0])
    path, token = await opened(mailing.client, url, "token", "new_password")
    weak = await submit(mailing.client, path, token=token, new_password="short")
    assert "at least 12 characters" in weak
    assert 'role="alert"' in weak
    assert "sign in" in await submit(mailing.client, path, token=url, new_password=NEW)  # pasted as a whole
    again = await submit(mailing.client, path, token=token, new_password=NEW)
    assert "The link was already used" in again
    assert (await ada.get("/auth/me")).code == "session_revoked"
    signed_in = await mailing.sign_in("ada@example.org", NEW)
    assert len((await signed_in.get("/auth/sessions")).json()["items"]) == 1  # the page opens no session
    assert token not in caplog.text
    assert f'value="{token}"' in weak  # the person only enters another password
    assert "short" not in weak


@pytest.mark.one_engine
async def test_an_invited_person_creates_the_account_in_a_browser(mailing: Kit) -> None:
    admin = await mailing.as_user("admin")
    invited = (await admin.post("/admin/invitations", {"email": "ada@example.org", "role": "viewer"})).json()
    path, token = await opened(mailing.client, invited["url"], "token", "full_name", "password")
    page = await submit(mailing.client, path, token=token, full_name="Ada <i>", password=PASSWORD)
    assert 'role="status"' in page
    assert f"<code>corral login {invited['url'].partition('/account/')[0]}</code>" in page
    assert (await mailing.sign_in("ada@example.org")).user["role"] == "viewer"
    late = await submit(mailing.client, path, token="x", full_name="Ada", password=PASSWORD)
    assert "The link was already used" in late
    content = urlencode({"token": token, "full_name": "", "password": PASSWORD}).encode()
    sent = {"content-type": "application/x-www-form-urlencoded", "accept": "text/html"}
    empty = (await mailing.client.post(path, content=content, headers=sent, root=True)).body.decode()
    assert '<p role="alert">Your name: at least 1 character' in empty


@pytest.mark.one_engine
async def test_a_person_verifies_an_address_in_a_browser(make_kit: Callable[..., Any], mail_server: MailServer) -> None:
    config = mail_server.config(**{"security.registration": "open", "security.email_verification": True})
    kit: Kit = await make_kit(plugins=("admin",), config=config)
    await kit.as_user("admin")
    body = {"email": "ada@example.org", "password": PASSWORD, "full_name": "Ada"}
    assert (await kit.client.post("/auth/register", body)).status == 202
    await kit.run_jobs()
    [url] = re.findall(r"https://\S+/account/\S+", mail_server.box.to("ada@example.org")[0].get_content())
    path, token = await opened(kit.client, url, "token")
    assert "Your address is verified" in await submit(kit.client, path, token=token)
    await kit.sign_in("ada@example.org")


@pytest.mark.one_engine
async def test_forms_share_the_limits_of_the_endpoints(make_kit: Callable[..., Any], mail_server: MailServer) -> None:
    kit: Kit = await make_kit(plugins=("security",), config=mail_server.config() | {"rate_limits": True})
    stop_refilling(kit)
    form = {"content-type": "application/x-www-form-urlencoded"}

    async def reset(*, page: bool) -> int:
        body = {"token": "x", "new_password": NEW}
        if not page:
            return (await kit.client.post("/auth/reset-password", body)).status
        data = urlencode(body).encode()
        return (await kit.client.post("/account/reset-password", content=data, headers=form, root=True)).status

    found = [await reset(page=number % 2 == 0) for number in range(12)]
    assert found == [200, 410] * 5 + [429, 429]


@pytest.mark.one_engine
async def test_many_people_behind_one_address_accept_invitations(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit: Kit = await make_kit(plugins=("admin", "security"), config=mail_server.config() | {"rate_limits": True})
    stop_refilling(kit)
    admin = await kit.as_user("admin")
    for number in range(7):
        email = f"colleague{number}@example.org"
        url = (await admin.post("/admin/invitations", {"email": email, "role": "member"})).json()["url"]
        fields = {"token": url, "full_name": "Colleague", "password": PASSWORD}
        assert 'role="status"' in await submit(kit.client, "/account/accept-invitation", **fields)


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("content", "media", "status"),
    [
        (b'{"token": "x"}', "application/json", 415),
        (b"token=%ff", "application/x-www-form-urlencoded", 400),
        (b"token=a&token=b", "application/x-www-form-urlencoded", 400),
        (b"token=x&new_password=y&role=admin", "application/x-www-form-urlencoded", 422),
        (b"token=%00&new_password=y", "application/x-www-form-urlencoded", 422),
        (b"token=x", "application/x-www-form-urlencoded", 422),
        (b"token=" + b"x" * 20_000, "application/x-www-form-urlencoded", 413),
    ],
)
async def test_what_is_no_such_form_is_refused(mailing: Kit, content: bytes, media: str, status: int) -> None:
    answer = await mailing.client.post(
        "/account/reset-password", content=content, headers={"content-type": media}, root=True
    )
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")


@pytest.mark.one_engine
async def test_a_browser_shows_why_a_form_was_refused(make_kit: Callable[..., Any], mail_server: MailServer) -> None:
    kit: Kit = await make_kit(plugins=("security",), config=mail_server.config() | {"rate_limits": True})
    stop_refilling(kit)
    sent = {"content-type": "application/x-www-form-urlencoded", "accept": "text/html,*/*;q=0.8"}

    async def refused(content: bytes) -> tuple[Answer, str]:
        answer = await kit.client.post("/account/reset-password", content=content, headers=sent, root=True)
        check(answer)
        return answer, answer.body.decode()

    answer, page = await refused(b"token=x&<script>=1")
    assert answer.status == 422
    assert "&lt;script&gt;: " in page
    assert "New password: " in page
    for _ in range(9):
        await refused(b"token=x")
    answer, page = await refused(b"token=x")
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) > 0
    assert re.search(r'<p role="alert">[^<]*\d+ s', page), page
