"""A real mail server on loopback, and kernels that know it."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from email import message_from_string, policy
from email.message import EmailMessage
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword

from corral.testing.kit import Kit
from corral.testing.server import free_port

LOGIN = (b"corral", b"a password of the mail server")


class Mailbox:
    """What a mail server took; `refuse` is what it says instead."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.signed_in: list[bool] = []
        self.over_tls: list[bool] = []
        self.refuse: str | None = None

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if self.refuse is not None:
            return self.refuse
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        parsed: Any = message_from_string(envelope.content.decode(), policy=policy.default)
        assert [parsed["To"].addresses[0].addr_spec] == envelope.rcpt_tos
        self.mails.append(parsed)
        self.signed_in.append(session.authenticated)
        self.over_tls.append(session.ssl is not None or server.transport.get_extra_info("ssl_object") is not None)
        return "250 OK"

    def to(self, address: str) -> list[EmailMessage]:
        """The mails to an address, oldest first."""
        return [mail for mail in self.mails if mail["To"].addresses[0].addr_spec == address]

    def token(self, address: str) -> str:
        """The token in the newest mail to an address."""
        return token_of(self.to(address)[-1].get_content())


def token_of(text: str) -> str:
    """The token of the one link in a text."""
    found = re.findall(r"https?://\S+/account/[a-z-]+#token=([\w-]{43})", text)
    assert len(found) == 1, text
    return str(found[0])


class MailServer:
    """`aiosmtpd` in a thread; `stop` and `start` come back on the same port."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, implicit: bool = False, login: bool = False) -> None:
        self.box = Mailbox()
        self.port = 0
        self._tls, self._implicit, self._login = tls, implicit, login
        self._controller: Controller | None = None

    def start(self) -> MailServer:
        options: dict[str, Any] = {}
        if self._tls is not None:
            options = {"ssl_context": self._tls} if self._implicit else {"tls_context": self._tls}
        if self._login:
            options.update(auth_required=True, authenticator=_authenticate, auth_require_tls=not self._implicit)
        controller = Controller(self.box, hostname="127.0.0.1", port=self.port or free_port(), **options)
        controller.start()
        self._controller, self.port = controller, controller.port
        return self

    def stop(self) -> None:
        if self._controller is not None:
            self._controller.stop()
            self._controller = None

    def allow(self) -> list[str]:
        """The exception of the egress guard that opens it."""
        return [f"127.0.0.1:{self.port}"]

    def config(self, **more: Any) -> dict[str, Any]:
        """For a kernel whose mail goes here."""
        settings = {"mail.host": "127.0.0.1", "mail.port": self.port, "mail.security": "none", **more}
        pinned = {f"settings.{name}": value for name, value in settings.items()}
        return {"egress.allow": self.allow(), "server.public_url": "https://corral.example", **pinned}


def _authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    given = isinstance(data, LoginPassword) and (data.login, data.password) == LOGIN
    return AuthResult(success=given, handled=False)


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    """Without TLS or login."""
    server = MailServer().start()
    yield server
    server.stop()


@pytest.fixture
async def mailing(make_kit: Callable[..., Any], mail_server: MailServer) -> Kit:
    """A kernel whose mail goes to `mail_server`, on each engine."""
    kit: Kit = await make_kit(plugins=("admin",), config=mail_server.config())
    return kit
