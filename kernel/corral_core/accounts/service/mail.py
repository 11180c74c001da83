"""Mails are jobs, which take effect with their unit: a mail server that is down delays them and nothing else."""

from __future__ import annotations

import logging
import time
from typing import Any

import peewee

from corral.auth.addresses import normalise
from corral.config.model import Config
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.errors import Conflict
from corral.jobs.job import Job, JobRow, enqueue
from corral.plugin import Settings
from corral_core.accounts.api import Delivery
from corral_core.accounts.service.links import Links
from corral_core.accounts.settings import MAIL_FROM, MAIL_HOST, MAIL_PASSWORD, MAIL_PORT, MAIL_SECURITY, MAIL_USERNAME

log = logging.getLogger("corral.mail")

JOB = "core.send_mail"
AT_ONCE = 500
TRIES = 60  # with the runner's backoff, about nine hours


class MailService:
    """Implements `corral_core.accounts.api.Mail`."""

    def __init__(self, settings: Settings, egress: Egress, links: Links, config: Config) -> None:
        self._settings, self._egress, self._links = settings, egress, links
        self._site = config.server.public_url or config.server.bind

    @property
    def is_configured(self) -> bool:
        return self._settings.get(MAIL_HOST) is not None

    def notify(self, to: str, kind: str, **facts: str | int) -> None:
        if self.is_configured and to:
            enqueue(JOB, kind=kind, to=to, facts=facts)

    def send_link(self, to: str, kind: str, subject_id: str, **facts: str | int) -> bool:
        """Mail a link that is good once; joins the unit. False: there is no mail service, or it has links enough."""
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
            raise Conflict("Set mail.host first.", current_status="not_configured")
        began = time.perf_counter()
        error = None
        try:
            await self.deliver("test", to, {})
        except (MailFailed, ValueError) as failure:
            error = str(failure)
        return Delivery(delivered=error is None, duration_ms=round((time.perf_counter() - began) * 1000), error=error)

    async def deliver(self, kind: str, to: str, facts: dict[str, Any]) -> None:
        """Hand a mail to the server now. Raises `MailFailed`; `ValueError` for an address that cannot be written."""
        from corral.egress.smtp import MailServer, deliver
        from corral_core.accounts.service.mail_templates import write

        get = self._settings.get
        security: Any = get(MAIL_SECURITY)
        host = get(MAIL_HOST) or ""
        server = MailServer(host, get(MAIL_PORT), security, get(MAIL_USERNAME), get(MAIL_PASSWORD))
        sender = get(MAIL_FROM) or f"corral@{host}"
        message = write(kind, sender=sender, to=to, site=self._site, facts=facts)
        await deliver(self._egress, server, message, sender=sender, to=message["To"].addresses[0].addr_spec)

    async def probe(self) -> str | None:
        """Connect to the server and sign in; what is wrong, or None."""
        from corral.egress.smtp import MailFailed, MailServer, probe

        get = self._settings.get
        security: Any = get(MAIL_SECURITY)
        server = MailServer(get(MAIL_HOST) or "", get(MAIL_PORT), security, get(MAIL_USERNAME), get(MAIL_PASSWORD))
        try:
            await probe(self._egress, server)
        except MailFailed as failure:
            return str(failure)
        return None

    @staticmethod
    def forget(email_key: str) -> None:
        """The account of this address was purged: nothing is sent there nor remembered of it; joins the unit."""
        jobs = JobRow.select(JobRow.id, JobRow.arguments).where(JobRow.name.startswith("core.")).limit(AT_ONCE)
        after = ""
        while page := list(jobs.where(JobRow.id > after).order_by(JobRow.id)):
            after = page[-1].id
            named = [(row.id, row.arguments.get("to") or row.arguments.get("email")) for row in page]
            gone = [job_id for job_id, email in named if email and normalise(email) == email_key]
            if gone:
                JobRow.delete().where(JobRow.id.in_(gone) & (JobRow.state != "running")).execute()

    def waiting(self) -> int:
        """How many mails wait because the server did not take them; joins the unit."""
        again = (JobRow.name == JOB) & (JobRow.state == "queued") & JobRow.error.is_null(False)
        return int(JobRow.select(peewee.fn.COUNT(JobRow.id)).where(again).scalar())


async def send_mail(
    kind: str, to: str, facts: dict[str, Any], work: Work, mail: MailService, links: Links, link_id: str | None = None
) -> None:
    """Send one mail. The token of its link is made now: it is stored nowhere, and its time begins when it leaves."""
    from corral.egress.smtp import MailRefused

    if not mail.is_configured:
        log.warning("a mail was not sent, since mail.host is not set any more", extra={"kind": kind})
        return
    if link_id is not None:
        token = await work(lambda: links.arm(link_id))
        if token is None:  # it was used or ended meanwhile: the mail would tell of a dead link
            return
        facts = {**facts, "url": links.url(kind, token, absolute=True)}
    try:
        await mail.deliver(kind, to, facts)
    except (MailRefused, ValueError) as refusal:
        log.warning("a mail will never be taken", extra={"kind": kind, "reason": str(refusal)})
        if link_id is not None:
            await work(lambda: links.forget(link_id))
    except BaseException:
        if link_id is not None:
            await work(lambda: links.disarm(link_id))
        raise


JOBS = (Job(JOB, send_mail, max_attempts=TRIES, seconds=120),)
