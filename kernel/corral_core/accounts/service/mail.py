"""Mails to users.

The current unit of work enqueues each mail as a job, so an unavailable mail server delays only mails.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import peewee

from corral.database.engine import Work
from corral.egress.client import Egress
from corral.errors import Conflict
from corral.jobs.job import JobRow, enqueue
from corral.plugin import Installation, Settings
from corral_core.accounts.api import Delivery
from corral_core.accounts.service.addresses import normalise
from corral_core.accounts.service.links import Links
from corral_core.accounts.settings import MAIL_FROM, MAIL_HOST, MAIL_PASSWORD, MAIL_PORT, MAIL_SECURITY, MAIL_USERNAME

log = logging.getLogger("corral.mail")

JOB = "accounts.send_mail"
AT_ONCE = 500


class MailService:
    """Implements `corral_core.accounts.api.Mail`."""

    def __init__(
        self, work: Work, settings: Settings, egress: Egress, links: Links, installation: Installation
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
        """Enqueue a mail with a single-use link. Runs in the caller's unit of work.

        Return False if no mail server is configured, or if the subject has too many live links of this kind.
        """
        if not self.is_configured:
            return False
        link_id = self._links.prepare(kind, subject_id, to)
        if link_id is None:
            return False
        enqueue(JOB, kind=kind, to=to, facts=facts, link_id=link_id)
        return True

    async def test(self, to: str) -> Delivery:
        from corral.egress.smtp import MailFailed

        if not self.is_configured:
            raise Conflict("No mail server is configured; set mail.host first.", current_status="not_configured")
        began = time.perf_counter()
        error = None
        try:
            await self.deliver("test", to, {})
        except (MailFailed, ValueError) as failure:
            error = str(failure)
        return Delivery(delivered=error is None, duration_ms=round((time.perf_counter() - began) * 1000), error=error)

    async def deliver(self, kind: str, to: str, facts: dict[str, Any]) -> None:
        """Send a mail now. Raise `MailFailed` on failure, or `ValueError` for an invalid address."""
        from corral.egress.smtp import MailServer, deliver
        from corral_core.accounts.service.mail_templates import write

        get = self._settings.get
        security: Any = get(MAIL_SECURITY)
        host = get(MAIL_HOST) or ""
        server = MailServer(host, get(MAIL_PORT), security, get(MAIL_USERNAME), get(MAIL_PASSWORD))
        sender = get(MAIL_FROM) or f"corral@{host}"
        message = write(kind, sender=sender, to=to, site=self._site, facts=facts)
        await deliver(self._egress, server, message, sender=sender, to=message["To"].addresses[0].addr_spec)

    async def check(self) -> tuple[str, str]:
        if not self.is_configured:
            return "disabled", "mail.host is not set."
        if not await self._answers():
            return "down", "The mail server does not accept connections with the configured settings."
        waiting = await self._work(self.waiting, read=True)
        if waiting:
            return "degraded", f"{waiting} mails are waiting because the mail server did not accept them."
        return "ok", "The mail server accepts connections."

    async def _answers(self) -> bool:
        """Return whether the mail server accepts the connection and the credentials."""
        from corral.egress.smtp import MailFailed, MailServer, probe

        get = self._settings.get
        security: Any = get(MAIL_SECURITY)
        server = MailServer(get(MAIL_HOST) or "", get(MAIL_PORT), security, get(MAIL_USERNAME), get(MAIL_PASSWORD))
        try:
            await probe(self._egress, server)
        except MailFailed:
            return False
        return True

    @staticmethod
    def forget(email_key: str) -> None:
        """Delete the jobs of mails to the address of a purged account. Runs in the caller's unit of work."""
        jobs = JobRow.select(JobRow.id, JobRow.arguments).where(JobRow.name.startswith("accounts.")).limit(AT_ONCE)
        after = ""
        while page := list(jobs.where(JobRow.id > after).order_by(JobRow.id)):
            after = page[-1].id
            named = [(row.id, row.arguments.get("to") or row.arguments.get("email")) for row in page]
            gone = [job_id for job_id, email in named if email and normalise(email) == email_key]
            if gone:
                JobRow.delete().where(JobRow.id.in_(gone) & (JobRow.state != "running")).execute()

    @staticmethod
    def waiting() -> int:
        """Return the number of failed mails that are queued for another attempt. Runs in the caller's unit of work."""
        again = (JobRow.name == JOB) & (JobRow.state == "queued") & JobRow.error.is_null(False)
        return int(JobRow.select(peewee.fn.COUNT(JobRow.id)).where(again).scalar())
