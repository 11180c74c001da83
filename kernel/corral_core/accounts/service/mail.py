"""Emails to users: a short plain-text template for each kind of email, and the service that sends emails.

Each email is enqueued as a job in the current unit of work, so an unavailable mail server does not delay the caller.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

import peewee

from corral import clock
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.errors import Conflict
from corral.jobs.job import JobRow, enqueue
from corral.plugin import InstallationConfig, Settings
from corral_core.accounts.api import TIMEZONE, MailFailed, MailTestResult, PluginEmail
from corral_core.accounts.service.email_addresses import normalize_address
from corral_core.accounts.service.links import SingleUseLinks
from corral_core.accounts.settings import (
    MAIL_FROM,
    MAIL_HOST,
    MAIL_PASSWORD,
    MAIL_PORT,
    MAIL_SECURITY,
    MAIL_USERNAME,
    SITE_NAME,
)

if TYPE_CHECKING:
    from corral_core.accounts.service.smtp import MailServer

SIGN_OFF = "\n\n-- \n{name} at {address}"
_RESET = "reset it immediately and tell an admin"
_CHANGE = "change your password immediately and tell an admin"


class MailTemplate(NamedTuple):
    """The subject and the text of an email, with placeholders such as `{name}`."""

    subject: str
    text: str


TEMPLATES: Mapping[str, MailTemplate] = {
    "reset": MailTemplate(
        "Reset your password",
        "Somebody, most likely you, asked to reset the password of {to}.\n\n"
        "Choose a new password within 30 minutes:\n{url}\n\n"
        "The link works once. If you have a second factor, it is still required.\n"
        "If you did not ask for this, ignore this mail: your password stays the same.",
    ),
    "set_password": MailTemplate(
        "Your account is ready",
        "An admin created an account for {to}.\n\nChoose your password within 7 days:\n{url}\n\nThe link works once.",
    ),
    "verify": MailTemplate(
        "Verify your address",
        "An account was created with the address {to}.\n\nConfirm within 24 hours that this is your address:\n{url}\n\n"
        "If you did not create it, ignore this mail: nobody can use the account without this link.",
    ),
    "change_email": MailTemplate(
        "Verify your new address",
        "Somebody, most likely you, asked to change the address of an account to {to}.\n\nConfirm within 24 "
        "hours that this is your address:\n{url}\n\n"
        "If you did not ask for this, ignore this mail.",
    ),
    "invitation": MailTemplate(
        "You are invited",
        "You are invited to create an account ({role}) with the address {to}.\n\nAccept within 7 days:\n{url}\n\n"
        "The link works once.",
    ),
    "address_taken": MailTemplate(
        "You already have an account",
        "Somebody, perhaps you, tried to register with {to}, which already has an account.\n\n"
        "If this was you, sign in, or reset your password if you forgot it.\n"
        "If it was not you, ignore this mail: nobody learned that the account exists.",
    ),
    "locked": MailTemplate(
        "Your account is temporarily locked",
        "There were too many failed attempts to sign in as {to}. The account is locked until {until}; existing "
        "sessions continue.\n\nIf these were not your attempts: nobody guessed your password. If you also "
        "use it elsewhere, choose another one.",
    ),
    "password_changed": MailTemplate(
        "Your password was changed",
        f"The password of {{to}} was changed, and all other sessions ended.\n\nIf this was not you, {_RESET}.",
    ),
    "email_changed": MailTemplate(
        "Your address was changed",
        "The address of your account changed from {to} to {new}.\n\nIf this was not you, tell an admin immediately.",
    ),
    "recovery_code_used": MailTemplate(
        "A recovery code was used",
        f"Somebody signed in as {{to}} with a recovery code; {{left}} codes are left.\n\nIf this was not you, "
        f"{_CHANGE}.",
    ),
    "refresh_reuse": MailTemplate(
        "A session was ended for security reasons",
        "A sign-in token of {to} was used twice, which happens when it is copied. The session has ended; sign in again."
        f"\n\nIf you see this more than once, {_CHANGE}.",
    ),
    "mfa_reset": MailTemplate(
        "Your second factor was removed",
        "An admin removed the second factor of {to}, and all sessions ended. Sign in and set up a new second factor."
        "\n\nIf you did not ask for this, tell an admin immediately.",
    ),
    "test": MailTemplate("Test", "This is a test of the mail settings. If you can read it, they are correct."),
}


def render_mail(kind: str, *, sender: str, to: str, name: str, address: str, facts: Mapping[str, Any]) -> EmailMessage:
    """Return the message for this kind of email. `name` and `address` are those of the installation.

    `facts` contains the values of the placeholders. Raise `ValueError` for an invalid email address.
    """
    template = TEMPLATES[kind]
    message = _new_message(sender, to, f"{name}: {template.subject}")
    message.set_content(
        (template.text + SIGN_OFF).format(**{**facts, "to": to, "name": name, "address": address}) + "\n"
    )
    return message


def render_plugin_email(email: PluginEmail, *, sender: str, name: str) -> EmailMessage:
    """Return the message for an email composed by a plugin. Raise `ValueError` for an invalid address or header."""
    message = _new_message(sender, email.to, f"{name}: {email.subject}")
    for header, value in email.headers.items():
        message[header] = value
    message.set_content(email.text)
    message.add_alternative(email.html, subtype="html")
    return message


def _new_message(sender: str, to: str, subject: str) -> EmailMessage:
    message = EmailMessage()
    message["From"] = _sender_address(sender)
    message["To"] = _sender_address(to)
    message["Subject"] = subject
    message["Date"] = format_datetime(datetime.fromtimestamp(clock.time_s(), UTC))
    message["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"
    return message


def _sender_address(text: str) -> Address:
    """Split an address at the last `@`, so that no part of it is parsed as another address or as a display name."""
    name, _, domain = text.rpartition("@")
    return Address(username=name, domain=domain)


log = logging.getLogger("corral.mail")

JOB = "accounts.send_mail"
AT_ONCE = 500


class MailService:
    """Queues and sends emails to users. Implements `corral_core.accounts.api.Mail` and `corral.plugin.MailProbe`."""

    def __init__(
        self, work: Work, settings: Settings, egress: Egress, links: SingleUseLinks, installation: InstallationConfig
    ) -> None:
        self._work, self._settings, self._egress, self._links = work, settings, egress, links
        self._site = installation.public_url or installation.bind

    @property
    def is_configured(self) -> bool:
        return self._settings.get(MAIL_HOST) is not None

    def notify(self, to: str, kind: str, **facts: str | int) -> None:
        if self.is_configured and to:
            enqueue(JOB, kind=kind, to=to, facts=facts)

    def send_link(self, to: str, kind: str, subject_id: str, **facts: str | int) -> bool:
        """Enqueue an email with a single-use link. Runs in the caller's unit of work.

        Return False if no mail server is configured, or if the account or invitation already has the maximum number of
        valid links of this kind.
        """
        if not self.is_configured:
            return False
        link_id = self._links.create_link(kind, subject_id, to)
        if link_id is None:
            return False
        enqueue(JOB, kind=kind, to=to, facts=facts, link_id=link_id)
        return True

    async def send_test_mail(self, to: str) -> MailTestResult:
        if not self.is_configured:
            raise Conflict("No mail server is configured; set mail.host first.", current_status="not_configured")
        began = time.perf_counter()
        error = None
        try:
            await self.send_now("test", to, {})
        except (MailFailed, ValueError) as failure:
            error = str(failure)
        return MailTestResult(
            delivered=error is None, duration_ms=round((time.perf_counter() - began) * 1000), error=error
        )

    async def send_now(self, kind: str, to: str, facts: dict[str, Any]) -> None:
        """Send an email now. Raise `MailFailed` if sending fails, or `ValueError` for an invalid address."""
        if "until" in facts:
            facts = {**facts, "until": self._local_time(facts["until"])}
        name, sender = self._settings.get(SITE_NAME), self._sender()
        await self._deliver(render_mail(kind, sender=sender, to=to, name=name, address=self._site, facts=facts))

    async def send_plugin_email(self, email: PluginEmail) -> None:
        if not self.is_configured:
            raise MailFailed("No mail server is configured; set mail.host first.")
        await self._deliver(render_plugin_email(email, sender=self._sender(), name=self._settings.get(SITE_NAME)))

    def _sender(self) -> str:
        return self._settings.get(MAIL_FROM) or f"corral@{self._server().host}"

    async def _deliver(self, message: EmailMessage) -> None:
        from corral_core.accounts.service.smtp import deliver

        to = message["To"].addresses[0].addr_spec
        await deliver(self._egress, self._server(), message, sender=self._sender(), to=to)

    def _local_time(self, instant: str) -> str:
        zone = self._settings.get(TIMEZONE)
        return f"{datetime.fromisoformat(instant).astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M} ({zone})"

    async def check_connection(self) -> tuple[str, str]:
        if not self.is_configured:
            return "disabled", "mail.host is not set."
        if await self.probe() is not None:
            return "down", "The mail server does not accept connections with the configured settings."
        waiting = await self._work(self.count_waiting, read=True)
        if waiting:
            return "degraded", f"{waiting} mails are waiting because the mail server did not accept them."
        return "ok", "The mail server accepts connections."

    async def probe(self) -> str | None:
        from corral_core.accounts.service.smtp import probe

        try:
            await probe(self._egress, self._server())
        except MailFailed as failure:
            return str(failure)
        return None

    def _server(self) -> MailServer:
        from corral_core.accounts.service.smtp import MailServer

        get = self._settings.get
        security: Any = get(MAIL_SECURITY)
        return MailServer(get(MAIL_HOST) or "", get(MAIL_PORT), security, get(MAIL_USERNAME), get(MAIL_PASSWORD))

    @staticmethod
    def delete_mail_jobs(email_key: str) -> None:
        """Delete jobs that would send emails to the address of a purged account. Runs in the caller's unit of work."""
        jobs = JobRow.select(JobRow.id, JobRow.arguments).where(JobRow.name.startswith("accounts.")).limit(AT_ONCE)
        after = ""
        while page := list(jobs.where(JobRow.id > after).order_by(JobRow.id)):
            after = page[-1].id
            named = [(row.id, row.arguments.get("to") or row.arguments.get("email")) for row in page]
            gone = [job_id for job_id, email in named if email and normalize_address(email) == email_key]
            if gone:
                JobRow.delete().where(JobRow.id.in_(gone) & (JobRow.state != "running")).execute()

    @staticmethod
    def count_waiting() -> int:
        """Return the number of failed emails that are queued for another attempt. Runs in the caller's unit of work."""
        again = (JobRow.name == JOB) & (JobRow.state == "queued") & JobRow.error.is_null(False)
        return int(JobRow.select(peewee.fn.COUNT(JobRow.id)).where(again).scalar())
