"""Sends mail through connections that the egress guard has allowed."""

from __future__ import annotations

import asyncio
import functools
import smtplib
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked, Policy, canonical_address, check_peer
from corral.egress.resolver import Unresolved

if TYPE_CHECKING:
    import ssl

    from corral.egress.upstream_proxy import EgressProxy

Security = Literal["starttls", "tls", "none"]

SINK = "mail"
SECONDS = 15.0  # time limit of each step of the SMTP dialogue
_threads = ThreadPoolExecutor(4, thread_name_prefix="corral-mail")


class MailServer(NamedTuple):
    """The mail server and its credentials. `password` is sent over TLS only."""

    host: str
    port: int
    security: Security = "starttls"
    username: str | None = None
    password: str | None = None


class MailFailed(Exception):
    """Raised when the server did not accept the mail. A later attempt may succeed. The message is for admins only."""


class MailRefused(MailFailed):
    """Raised when the server rejected the mail permanently, because of its recipient or content."""


async def deliver(egress: Egress, server: MailServer, message: EmailMessage, *, sender: str, to: str) -> None:
    """Send one email. Raises `MailFailed` or `MailRefused`."""

    def send(smtp: smtplib.SMTP) -> None:
        try:
            smtp.send_message(message, sender, [to])
        except smtplib.SMTPRecipientsRefused as error:
            code, text = next(iter(error.recipients.values()))
            kind = MailRefused if code >= 500 else MailFailed
            raise kind(f"the mail server rejected the recipient: {code} {_words(text)}") from None
        except smtplib.SMTPDataError as error:
            kind = MailRefused if error.smtp_code >= 500 else MailFailed
            raise kind(f"the mail server rejected the message: {error.smtp_code} {_words(error.smtp_error)}") from None

    await _with_server(egress, server, send)


async def probe(egress: Egress, server: MailServer) -> None:
    """Test the mail server: connect and sign in, without sending mail. Raises `MailFailed`."""
    await _with_server(egress, server, lambda smtp: smtp.noop())


async def _with_server(egress: Egress, server: MailServer, act: Callable[[smtplib.SMTP], Any]) -> None:
    try:
        addresses = await egress.addresses(server.host, server.port, Policy("internal"))
        context = egress.tls_context()
        run = functools.partial(_talk, server, addresses, context, egress.proxy(), act)
        await asyncio.get_running_loop().run_in_executor(_threads, run)
    except EgressBlocked as blocked:
        egress.count(SINK, "blocked", server.host)
        raise MailFailed(f"{blocked.reason} Set CORRAL_EGRESS_ALLOW to allow the mail server.") from None
    except TimeoutError:
        egress.count(SINK, "timed_out", server.host)
        raise MailFailed(f"{server.host}:{server.port} did not answer in time") from None
    except (OSError, smtplib.SMTPException, Unresolved) as error:
        egress.count(SINK, "failed", server.host)
        raise MailFailed(f"{server.host}:{server.port}: {_reason(error)}") from None
    egress.count(SINK, "answered", server.host)


def _talk(
    server: MailServer,
    addresses: Sequence[str],
    context: ssl.SSLContext,
    proxy: EgressProxy | None,
    act: Callable[[smtplib.SMTP], Any],
) -> None:
    smtp = _GuardedSmtp(server, addresses, context, proxy)
    try:
        if server.security == "starttls":
            smtp.starttls(context=context)  # raises if not offered, so nothing is sent in the clear
        if server.username and server.security != "none":
            smtp.login(server.username, server.password or "")
        act(smtp)
        smtp.quit()
    finally:
        smtp.close()


class _GuardedSmtp(smtplib.SMTP):
    """An SMTP client that connects only to allowed addresses. TLS verifies the certificate for the requested name."""

    def __init__(
        self, server: MailServer, addresses: Sequence[str], context: ssl.SSLContext, proxy: EgressProxy | None
    ) -> None:
        self._addresses, self._proxy = addresses, proxy
        self._implicit = context if server.security == "tls" else None
        super().__init__(server.host, server.port, local_hostname=socket.gethostname(), timeout=SECONDS)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        failure: OSError = OSError(f"{host} has no address")
        for address in self._addresses:
            try:
                opened = self._connect(address, port, timeout)
            except OSError as error:
                failure = error
                continue
            return opened if self._implicit is None else self._implicit.wrap_socket(opened, server_hostname=host)
        raise failure

    def _connect(self, address: str, port: int, timeout: float) -> socket.socket:
        if self._proxy is not None and not canonical_address(address).is_loopback:
            return self._proxy.open_socket((address, port), timeout)
        opened = socket.create_connection((address, port), timeout)
        try:
            check_peer(opened.getpeername(), address)
        except EgressBlocked:
            opened.close()
            raise
        return opened


def _words(text: bytes | str) -> str:
    return (text if isinstance(text, str) else text.decode("utf-8", "replace"))[:300]


def _reason(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {_words(error.smtp_error)}"
    return str(error) or type(error).__name__
