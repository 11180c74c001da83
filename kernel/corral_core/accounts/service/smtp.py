"""Sends emails over connections that the egress guard has allowed."""

from __future__ import annotations

import asyncio
import functools
import os
import smtplib
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from typing import Any, Literal, NamedTuple

from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked, Policy
from corral.egress.resolver import Unresolved
from corral_core.accounts.api import MailFailed, MailRefused

Security = Literal["starttls", "tls", "none"]

SINK = "mail"
SECONDS = 15.0  # time limit of each step of the SMTP dialogue
_threads = ThreadPoolExecutor(4, thread_name_prefix="corral-mail")


class MailServer(NamedTuple):
    """The mail server and its credentials. `password` is sent only over TLS."""

    host: str
    port: int
    security: Security = "starttls"
    username: str | None = None
    password: str | None = None


async def deliver(egress: Egress, server: MailServer, message: EmailMessage, *, sender: str, to: str) -> None:
    """Send one email. Raise `MailFailed` or `MailRefused` if it cannot be delivered."""

    def send(smtp: smtplib.SMTP) -> None:
        try:
            smtp.send_message(message, sender, [to])
        except smtplib.SMTPRecipientsRefused as error:
            code, text = next(iter(error.recipients.values()))
            kind = MailRefused if code >= 500 else MailFailed
            raise kind(f"the mail server rejected the recipient: {code} {_reply_text(text)}") from None
        except smtplib.SMTPDataError as error:
            kind = MailRefused if error.smtp_code >= 500 else MailFailed
            raise kind(
                f"the mail server rejected the message: {error.smtp_code} {_reply_text(error.smtp_error)}"
            ) from None

    await _connect_and_run(egress, server, send)


async def probe(egress: Egress, server: MailServer) -> None:
    """Connect and sign in to the mail server without sending an email. Raise `MailFailed` if this fails."""
    await _connect_and_run(egress, server, lambda smtp: smtp.noop())


async def _connect_and_run(egress: Egress, server: MailServer, act: Callable[[smtplib.SMTP], Any]) -> None:
    try:
        addresses = await egress.addresses(server.host, server.port, Policy("internal"))
        connect = functools.partial(egress.open_socket, addresses, server.port, SECONDS)
        run = functools.partial(_run_session, server, connect, egress.tls_context(), act)
        await asyncio.get_running_loop().run_in_executor(_threads, run)
    except EgressBlocked as blocked:
        egress.count(SINK, "blocked", server.host)
        raise MailFailed(blocked.reason) from None
    except TimeoutError:
        egress.count(SINK, "timed_out", server.host)
        raise MailFailed(f"{server.host}:{server.port} did not answer in time") from None
    except (OSError, smtplib.SMTPException, Unresolved) as error:
        egress.count(SINK, "failed", server.host)
        raise MailFailed(f"{server.host}:{server.port}: {_reason(error)}") from None
    egress.count(SINK, "answered", server.host)


def _run_session(
    server: MailServer,
    connect: Callable[[], socket.socket],
    context: ssl.SSLContext,
    act: Callable[[smtplib.SMTP], Any],
) -> None:
    smtp = _GuardedSmtp(server, connect, context)
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
    """An SMTP client on a socket opened by the egress guard.

    With TLS, the client verifies that the certificate is valid for the host name of the mail server.
    """

    def __init__(self, server: MailServer, connect: Callable[[], socket.socket], context: ssl.SSLContext) -> None:
        self._open_socket, self._implicit = connect, context if server.security == "tls" else None
        super().__init__(server.host, server.port, local_hostname=socket.gethostname(), timeout=SECONDS)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        opened = self._open_socket()
        return opened if self._implicit is None else self._implicit.wrap_socket(opened, server_hostname=host)


def _reply_text(text: bytes | str) -> str:
    return (text if isinstance(text, str) else text.decode("utf-8", "replace"))[:300]


def _reason(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        if error.smtp_code < 0:  # the reply begins with no code
            return "the server does not reply like a mail server; check mail.host, mail.port and mail.security"
        return f"{error.smtp_code} {_reply_text(error.smtp_error)}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the TLS certificate was refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"the TLS handshake failed; check mail.security and mail.port ({error.reason or error})"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or "the connection was closed"
