"""The settings of the mail server, changed while the product runs; and `corral doctor`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer

from corral.cli import doctor
from corral.config.reader import load
from corral.testing.kit import Kit
from corral_core.accounts.service.mail import MailService

pytestmark = pytest.mark.one_engine


@pytest.fixture
async def kit(make_kit: Callable[..., Any], mail_server: MailServer) -> Kit:
    """A kernel that may reach the mail server, and does not know it yet."""
    made: Kit = await make_kit(plugins=("admin", "settings"), config={"egress.allow": mail_server.allow()})
    return made


async def test_a_mail_server_is_named_while_the_product_runs(kit: Kit, mail_server: MailServer) -> None:
    admin = await kit.as_user("admin")
    refused = await admin.put("/settings/security/email_verification", {"value": True})
    assert refused.status == 422, refused
    assert "mail.host" in refused.body.decode()
    mail = kit.kernel.container.get(MailService)
    assert not mail.is_configured
    body = {
        "mail.host": "127.0.0.1",
        "mail.port": mail_server.port,
        "mail.security": "none",
        "mail.from": "me@x.example",
    }
    changed = await admin.put("/settings/bulk", {"settings": body})
    assert changed.status == 200, changed
    async with asyncio.timeout(60):
        while not mail.is_configured:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.05)
    assert (await mail.send_test_mail("ada@example.org")).delivered
    assert mail_server.box.mails[0]["From"] == "me@x.example"
    assert (await admin.put("/settings/security/email_verification", {"value": True})).status == 200
    gone = await admin.put("/settings/mail/host", {"value": None})
    assert gone.status == 422, gone


@pytest.mark.parametrize(
    ("key", "value"),
    [("host", "a host"), ("host", ""), ("from", "nobody"), ("port", 0), ("port", 70000), ("security", "ssl")],
)
async def test_values_out_of_bounds_are_refused(key: str, value: Any, kit: Kit) -> None:
    admin = await kit.as_user("admin")
    assert (await admin.put(f"/settings/mail/{key}", {"value": value})).status == 422


async def test_errors_about_formats_are_in_words(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    for path, value, detail in (
        (
            "mail/host",
            "a host",
            "mail.host must be text of 1 to 253 characters (a host name or an address, such as smtp.",
        ),
        (
            "http/cors_origins",
            ["x"],
            "http.cors_origins must be a list of 0 to 100 items (origins without a path, such",
        ),
    ):
        (fault,) = (await admin.put(f"/settings/{path}", {"value": value})).json()["errors"]
        assert fault["code"] == "bad_format"
        assert fault["detail"].startswith(detail)


async def test_the_password_is_never_shown(kit: Kit) -> None:
    admin = await kit.as_user("admin")
    changed = await admin.put("/settings/mail/password", {"value": "a password of the mail server"})
    assert changed.status == 200, changed
    shown = (await admin.get("/settings?category=mail")).json()
    assert shown["mail"]["password"] == "********"


def test_doctor_asks_the_mail_server(mail_server: MailServer) -> None:
    def found(**overrides: Any) -> Any:
        [finding] = doctor.check_mail(load({}, path=Path(os.devnull), overrides=overrides))
        return finding

    assert found(**mail_server.config()).status == "ok"
    mail_server.stop()
    down = found(**mail_server.config())
    assert (down.status, "127.0.0.1" in down.detail) == ("warning", True)
    assert "not configured in the file or the environment" in found().detail
