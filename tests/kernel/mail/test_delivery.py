"""Mails leave by the settings of the mail server, are tried again, and never hold anybody up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.mail.conftest import LOGIN, MailServer
from tests.limits import within

from corral import clock
from corral.jobs.job import JobRow
from corral.testing.certificates import CertificateAuthority
from corral.testing.kit import Kit
from corral.testing.stub_servers import FakeResolver
from corral_core.accounts.service.mail import MailService

pytestmark = pytest.mark.one_engine


def service(kit: Kit) -> MailService:
    return kit.kernel.container.get(MailService)


async def notify(kit: Kit, to: str = "ada@example.org", kind: str = "password_changed", **facts: Any) -> None:
    await kit.kernel.database.work(lambda: service(kit).notify(to, kind, **facts))


async def states(kit: Kit) -> list[tuple[str, int, str | None]]:
    jobs = JobRow.select().where(JobRow.name == "accounts.send_mail")
    rows = await kit.kernel.database.work(lambda: list(jobs), read=True)
    return [(row.state, row.attempts, row.error) for row in rows]


async def test_a_mail_is_sent_with_the_unit_that_asks_for_it(mailing: Kit, mail_server: MailServer) -> None:
    def rolled_back() -> None:
        service(mailing).notify("nobody@example.org", "password_changed")
        raise LookupError

    with pytest.raises(LookupError):
        await mailing.kernel.database.work(rolled_back)
    await notify(mailing)
    await mailing.run_jobs()
    [mail] = mail_server.box.mails
    assert mail["To"] == "ada@example.org"
    assert mail["From"] == "corral@127.0.0.1"
    assert mail["Subject"] == "Corral: Your password was changed"
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail.get_content_type() == "text/plain"
    assert "ada@example.org was changed" in mail.get_content()
    assert "https://corral.example" in mail.get_content()


async def test_mails_bear_the_name_of_the_installation_and_local_times(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit: Kit = await make_kit(plugins=("settings",), config=mail_server.config())
    admin = await kit.as_user("admin")
    for name, value in (("site_name", "Ranch"), ("timezone", "Europe/Berlin")):
        assert (await admin.put(f"/settings/general/{name}", {"value": value})).status == 200
    await notify(kit, kind="locked", until="2026-07-01T10:30:00.000000Z")
    await kit.run_jobs()
    [mail] = mail_server.box.mails
    assert mail["Subject"].startswith("Ranch: ")
    assert "until 2026-07-01 12:30 (Europe/Berlin)" in mail.get_content()
    assert "Ranch at https://corral.example" in mail.get_content()


async def test_without_a_mail_service_nothing_is_written(make_kit: Callable[..., Any]) -> None:
    kit: Kit = await make_kit(plugins=("admin",))
    assert not service(kit).is_configured
    await notify(kit)
    assert await states(kit) == []


@pytest.mark.parametrize("address", ['"a,b"@example.org', "käthe@example.org", "a+b@xn--bcher-kva.example"])
async def test_an_address_is_one_recipient_whatever_it_looks_like(
    address: str, mailing: Kit, mail_server: MailServer
) -> None:
    await notify(mailing, address)
    await mailing.run_jobs()
    [mail] = mail_server.box.mails  # the envelope names the same one: the mailbox compares
    assert len(mail["To"].addresses) == 1


async def test_a_server_that_is_down_delays_mails_and_nothing_else(mailing: Kit, mail_server: MailServer) -> None:
    mail_server.stop()
    await notify(mailing)
    await mailing.run_jobs()
    [(state, attempts, error)] = await states(mailing)
    assert (state, attempts) == ("queued", 1)
    assert error is not None
    assert error.endswith(f" 127.0.0.1:{mail_server.port}: Connection refused")
    assert await mailing.kernel.database.work(service(mailing).count_waiting, read=True) == 1
    async with within(5):
        await mailing.as_user("member")  # a sign-in
    mail_server.start()
    clock.travel(3600)
    await mailing.run_jobs()
    assert [(state, error) for state, _, error in await states(mailing)] == [("done", None)]
    assert len(mail_server.box.mails) == 1
    assert await mailing.kernel.database.work(service(mailing).count_waiting, read=True) == 0


async def test_an_hour_without_a_server_loses_no_mail(mailing: Kit, mail_server: MailServer) -> None:
    mail_server.stop()
    for number in range(3):
        await notify(mailing, f"user{number}@example.org")
    for _ in range(8):
        await mailing.run_jobs()
        clock.travel(600)
    mail_server.start()
    await mailing.run_jobs()
    assert sorted(str(mail["To"]) for mail in mail_server.box.mails) == [f"user{n}@example.org" for n in range(3)]


async def test_a_refused_recipient_is_not_tried_again(mailing: Kit, mail_server: MailServer) -> None:
    mail_server.box.refuse = "550 no such user here"
    await notify(mailing)
    await mailing.run_jobs()
    assert [(state, attempts) for state, attempts, _ in await states(mailing)] == [("done", 1)]
    mail_server.box.refuse = "450 try later"
    await notify(mailing)
    await mailing.run_jobs()
    assert sorted(state for state, _, _ in await states(mailing)) == ["done", "queued"]


# -- TLS, names and the guard


async def kit_with(make_kit: Callable[..., Any], server: MailServer, **settings: Any) -> Kit:
    named = {f"mail.{name}": value for name, value in settings.items()}
    kit: Kit = await make_kit(plugins=("admin",), config=server.config(**named))
    return kit


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_certificates_are_verified(
    security: str, make_kit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = CertificateAuthority(tmp_path)
    server = MailServer(tls=authority.server("localhost"), implicit=security == "tls", login=True).start()
    login = {"host": "localhost", "username": LOGIN[0].decode(), "password": LOGIN[1].decode(), "security": security}
    try:
        stranger = await kit_with(make_kit, server, **login)
        refused = await service(stranger).send_test_mail("ada@example.org")
        assert not refused.delivered
        assert "certificate" in (refused.error or "").lower()
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        kit = await kit_with(make_kit, server, **login)
        assert (await service(kit).send_test_mail("ada@example.org")).delivered
        assert (server.box.signed_in, server.box.over_tls) == ([True], [True])
        misnamed = await kit_with(make_kit, server, **{**login, "host": "127.0.0.1"})
        assert not (await service(misnamed).send_test_mail("ada@example.org")).delivered
        wrong = await kit_with(make_kit, server, **{**login, "password": "another"})
        assert "535" in ((await service(wrong).send_test_mail("ada@example.org")).error or "")
    finally:
        server.stop()


async def test_starttls_that_is_not_offered_sends_nothing(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit = await kit_with(make_kit, mail_server, security="starttls")
    told = await service(kit).send_test_mail("ada@example.org")
    assert not told.delivered
    assert "STARTTLS" in (told.error or "")
    assert mail_server.box.mails == []


async def test_the_guard_judges_the_mail_server(make_kit: Callable[..., Any], mail_server: MailServer) -> None:
    config = mail_server.config() | {"egress.allow": []}
    kit: Kit = await make_kit(plugins=("admin",), config=config)
    told = await service(kit).send_test_mail("ada@example.org")
    assert not told.delivered
    assert "CORRAL_EGRESS_ALLOW" in (told.error or "")
    assert mail_server.box.mails == []
    assert kit.kernel.egress.requests["mail", "blocked"] == 1


async def test_the_proxy_is_told_the_judged_address(make_kit: Callable[..., Any], mail_server: MailServer) -> None:
    heads: list[bytes] = []

    async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(4096):
            sink.write(data)
        sink.close()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        there, back = await asyncio.open_connection("127.0.0.1", mail_server.port)
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        await asyncio.gather(relay(there, writer), relay(reader, back))

    proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    config = mail_server.config(**{"mail.host": "mail.example", "mail.port": 587}) | {"egress.proxy": url}
    kit: Kit = await make_kit(plugins=("admin",), config=config)
    kit.kernel.egress.resolve = FakeResolver({"mail.example": [["10.0.0.25"]]})
    told = await service(kit).send_test_mail("ada@example.org")
    assert told.delivered, told
    assert heads[0].startswith(b"CONNECT 10.0.0.25:587 HTTP/1.1\r\n")
    assert b"mail.example" not in heads[0]
    assert len(mail_server.box.mails) == 1
    proxy.close()
    await proxy.wait_closed()
    assert "10.0.0.25" not in ((await service(kit).send_test_mail("ada@example.org")).error or "")


async def test_a_server_that_says_nothing_is_given_up(
    make_kit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mail_server: MailServer
) -> None:
    from corral_core.accounts.service import smtp

    monkeypatch.setattr(smtp, "SECONDS", 0.3)
    kept: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda reader, writer: kept.append(writer), "127.0.0.1", 0)
    mail_server.stop()
    mail_server.port = silent.sockets[0].getsockname()[1]
    kit = await kit_with(make_kit, mail_server)
    told = await service(kit).send_test_mail("ada@example.org")
    assert not told.delivered
    assert "timed out" in (told.error or "")
    silent.close()


async def test_errors_of_the_connection_name_the_settings_to_check(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit = await kit_with(make_kit, mail_server, security="tls")  # the server speaks no TLS
    told = await service(kit).send_test_mail("ada@example.org")
    assert "the TLS handshake failed; check mail.security and mail.port (" in (told.error or "")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello, I am no mail server\r\n")
        await writer.drain()
        writer.close()

    other = await asyncio.start_server(answer, "127.0.0.1", 0)
    mail_server.stop()
    mail_server.port = other.sockets[0].getsockname()[1]
    told = await service(await kit_with(make_kit, mail_server)).send_test_mail("ada@example.org")
    assert "the server does not reply like a mail server; check mail.host, mail.port" in (told.error or "")
    other.close()


async def test_the_health_check_signs_in_and_sends_nothing(mailing: Kit, mail_server: MailServer) -> None:
    assert (await service(mailing).check_connection())[0] == "ok"
    mail_server.stop()
    assert (await service(mailing).check_connection())[0] == "down"
    assert mail_server.box.mails == []


async def test_the_password_of_the_mail_server_is_known_to_the_redactor(
    make_kit: Callable[..., Any], mail_server: MailServer
) -> None:
    kit = await kit_with(make_kit, mail_server, username="corral", password="a password of the mail server")
    text = kit.kernel.redactor.redact("login failed for a password of the mail server")
    assert "a password of" not in text


def test_mail_templates_are_plain_and_complete() -> None:
    from corral_core.accounts.service.mail import TEMPLATES, render_mail

    facts = {"url": "https://x/#t", "until": "noon", "new": "b@x", "left": 3, "role": "member"}
    for kind in TEMPLATES:
        mail = render_mail(kind, sender="c@x.example", to="a@x.example", name="Ranch", address="here", facts=facts)
        text = mail.get_content()
        assert "{" not in text, kind
        assert len(text) < 700, kind
