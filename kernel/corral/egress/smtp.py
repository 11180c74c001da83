"""Sends mail through connections that the egress guard has allowed."""

from __future__ import annotations

import asyncio
import smtplib
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked, HostPort, Policy, canonical_address
from corral.egress.resolver import Unresolved

if TYPE_CHECKING:
    import ssl

    from corral.egress.network import Proxy

Security = Literal["starttls", "tls", "none"]

SINK = "mail"
SECONDS = 15.0  # time limit of each step of the SMTP dialogue
MAX_RESPONSE_HEAD = 8 * 1024
_threads = ThreadPoolExecutor(4, thread_name_prefix="corral-mail")


class MailServer(NamedTuple):
    """The mail server and its credentials. `password` is sent over TLS only."""

    host: str
    port: int
    security: Security = "starttls"
    username: str | None = None
    password: str | None = None


class MailFailed(Exception):
    """Raised when the server did not accept the mail. A later attempt may succeed. The text is for admins."""


class MailRefused(MailFailed):
    """Raised when the server rejected the mail permanently, because of its recipient or content."""


async def deliver(egress: Egress, server: MailServer, message: EmailMessage, *, sender: str, to: str) -> None:
    """Send one mail. Raises `MailFailed` or `MailRefused`."""

    def send(smtp: smtplib.SMTP) -> None:
        try:
            smtp.send_message(message, sender, [to])
        except smtplib.SMTPRecipientsRefused as error:
            code, text = next(iter(error.recipients.values()))
            raise (MailRefused if code >= 500 else MailFailed)(f"recipient refused: {code} {_words(text)}") from None
        except smtplib.SMTPDataError as error:
            kind = MailRefused if error.smtp_code >= 500 else MailFailed
            raise kind(f"text refused: {error.smtp_code} {_words(error.smtp_error)}") from None

    await _with_server(egress, server, send)


async def probe(egress: Egress, server: MailServer) -> None:
    """Connect and sign in without sending mail. Raises `MailFailed`."""
    await _with_server(egress, server, lambda smtp: smtp.noop())


async def _with_server(egress: Egress, server: MailServer, act: Callable[[smtplib.SMTP], Any]) -> None:
    try:
        addresses = await egress.addresses(server.host, server.port, Policy("internal"))
        context = egress.tls_context()
        loop = asyncio.get_running_loop()
        tunnel = egress.tunnel()
        await loop.run_in_executor(_threads, lambda: _talk(server, addresses, context, tunnel, act))
    except EgressBlocked as blocked:
        egress.note(SINK, "blocked", server.host)
        raise MailFailed(f"{blocked.reason} CORRAL_EGRESS_ALLOW opens exact exceptions.") from None
    except TimeoutError:
        egress.note(SINK, "timed_out", server.host)
        raise MailFailed(f"{server.host}:{server.port} did not answer in time") from None
    except (OSError, smtplib.SMTPException, Unresolved) as error:
        egress.note(SINK, "failed", server.host)
        raise MailFailed(f"{server.host}:{server.port}: {_reason(error)}") from None
    egress.note(SINK, "answered", server.host)


def _talk(
    server: MailServer,
    addresses: Sequence[str],
    context: ssl.SSLContext,
    tunnel: Proxy | None,
    act: Callable[[smtplib.SMTP], Any],
) -> None:
    smtp = _GuardedSmtp(server, addresses, context, tunnel)
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
    """An SMTP client that connects only to the allowed addresses. TLS verifies the requested name."""

    def __init__(
        self, server: MailServer, addresses: Sequence[str], context: ssl.SSLContext, tunnel: Proxy | None
    ) -> None:
        super().__init__(local_hostname=socket.gethostname(), timeout=SECONDS)
        self._addresses, self._implicit = addresses, context if server.security == "tls" else None
        self._tunnel = tunnel
        self._host = server.host
        code, text = self.connect(server.host, server.port)
        if code != 220:
            self.close()
            raise smtplib.SMTPConnectError(code, text)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        failure: OSError = OSError(f"{host} has no address")
        for address in self._addresses:
            try:
                opened = self._open(address, port, timeout)
            except OSError as error:
                failure = error
                continue
            return opened if self._implicit is None else self._implicit.wrap_socket(opened, server_hostname=host)
        raise failure

    def _open(self, address: str, port: int, timeout: float) -> socket.socket:
        if self._tunnel is not None and not canonical_address(address).is_loopback:  # the proxy's loopback is not ours
            return _tunnelled(self._tunnel, (address, port), timeout)
        opened = socket.create_connection((address, port), timeout)
        if canonical_address(str(opened.getpeername()[0])) != canonical_address(address):
            opened.close()
            raise EgressBlocked(
                "egress.address", "The connection reached another address than the one that was checked."
            )
        return opened


def _tunnelled(proxy: Proxy, to: HostPort, timeout: float) -> socket.socket:
    if proxy.tls:  # sockets of `ssl` cannot run TLS inside TLS
        raise OSError("mail needs a proxy with an http:// URL in CORRAL_EGRESS_PROXY")
    opened = socket.create_connection(proxy.place, timeout)
    try:
        opened.sendall(proxy.request(to))
        head = b""
        while not head.endswith(b"\r\n\r\n") and len(head) < MAX_RESPONSE_HEAD and (read := opened.recv(1)):
            head += read  # byte by byte: the next bytes come from the mail server
        if not proxy.has_opened(head):
            raise OSError("the egress proxy did not open a tunnel")
    except BaseException:
        opened.close()
        raise
    return opened


def _words(text: bytes | str) -> str:
    return (text if isinstance(text, str) else text.decode("utf-8", "replace"))[:300]


def _reason(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {_words(error.smtp_error)}"
    return str(error) or type(error).__name__
