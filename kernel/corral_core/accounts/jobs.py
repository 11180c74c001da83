"""Jobs and schedules that send emails and delete expired rows.

Rows are deleted in batches of at most `AT_ONCE` rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from corral import clock
from corral.database.engine import Work
from corral.jobs.job import Job, Schedule
from corral.plugin import Settings
from corral_core.accounts.api import MailRefused
from corral_core.accounts.models import RefreshRow, SessionRow, SigningKeyRow
from corral_core.accounts.service import authentication, links, lockout, second_factor
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.authentication import MAX_LIFE_SECONDS
from corral_core.accounts.service.links import RESET, SingleUseLinks
from corral_core.accounts.service.mail import JOB as SEND
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.recovery import FORGOT
from corral_core.accounts.service.registration import RESEND, send_verification
from corral_core.accounts.service.sessions import Sessions
from corral_core.accounts.settings import REFRESH_GRACE

DAY, HOUR = 86_400.0, 3600.0
AT_ONCE = 500
KEEP_SESSIONS_DAYS = 30
MAIL_ATTEMPTS = 60  # with the backoff of the job runner, about nine hours
log = logging.getLogger("corral.mail")


async def send_mail(
    kind: str,
    to: str,
    facts: dict[str, Any],
    work: Work,
    mail: MailService,
    links: SingleUseLinks,
    link_id: str | None = None,
) -> None:
    """Send one email. If it contains a link, generate the link's token and store the token's hash.

    The link's lifetime begins when the email is sent, because the token does not exist before then.
    """
    if not mail.is_configured:
        log.warning("mail dropped because mail.host is no longer set", extra={"kind": kind})
        return
    if link_id is not None:
        token = await work(lambda: links.generate_token(link_id))
        if token is None:  # the link was used or invalidated meanwhile
            return
        facts = {**facts, "url": links.link_url(kind, token)}
    try:
        await mail.send_now(kind, to, facts)
    except (MailRefused, ValueError) as refusal:
        log.warning("mail permanently rejected by the mail server", extra={"kind": kind, "reason": str(refusal)})
        if link_id is not None:
            await work(lambda: links.delete_link(link_id))
    except BaseException:
        if link_id is not None:
            await work(lambda: links.invalidate_token(link_id))
        raise


def forgot_password(email: str, accounts: AccountsService, mail: MailService) -> None:
    """Enqueue an email with a password-reset link if an active account has this address."""
    row = accounts.find_row(email)
    if row is not None and row.is_active:
        mail.send_link(row.email, RESET, row.id)


def resend_verification(email: str, accounts: AccountsService, mail: MailService) -> None:
    """Email another verification link if an active account has this address and the address is not yet verified."""
    row = accounts.find_row(email)
    if row is not None and row.is_active and not row.email_verified:
        send_verification(row, mail)


async def purge_sessions(work: Work, sessions: Sessions) -> None:
    """End expired sessions and delete old rows.

    Sessions are deleted 30 days after their end. Expired tickets, links and challenges, unfinished second-factor
    setups, old lockouts and retired signing keys are deleted too.
    """
    await _repeat_in_batches(work, sessions.end_expired)
    await _repeat_in_batches(work, _delete_sessions)
    await _repeat_in_batches(work, authentication.delete_expired_tickets)
    await _repeat_in_batches(work, links.delete_expired_links)
    await _repeat_in_batches(work, second_factor.delete_expired_challenges)
    await _repeat_in_batches(work, lockout.delete_old_lockouts)
    await work(_delete_keys)


async def erase_token_successors(work: Work, settings: Settings) -> None:
    """Erase the encrypted successors of used refresh tokens after their grace period."""
    await _repeat_in_batches(work, lambda: _erase_successors(clock.now(-settings.get(REFRESH_GRACE))))


JOBS = (
    Job(SEND, send_mail, max_attempts=MAIL_ATTEMPTS, lease_seconds=120),
    Job(FORGOT, forgot_password),
    Job(RESEND, resend_verification),
)
SCHEDULES = (
    Schedule("accounts.purge_sessions", HOUR, purge_sessions),
    Schedule("accounts.forget_successors", 30.0, erase_token_successors),
)


async def _repeat_in_batches(work: Work, sweep: Callable[[], int]) -> None:
    while await work(sweep) >= AT_ONCE:
        continue


def _erase_successors(before: str) -> int:
    over = RefreshRow.successor.is_null(False) & (RefreshRow.used_at <= before)
    batch = RefreshRow.select(RefreshRow.hash).where(over).limit(AT_ONCE)
    return int(RefreshRow.update(successor=None).where(RefreshRow.hash.in_(batch)).execute())


def _delete_sessions() -> int:
    ended = SessionRow.ended_at.is_null(False) & (SessionRow.ended_at < clock.now(-KEEP_SESSIONS_DAYS * DAY))
    found = [row.id for row in SessionRow.select(SessionRow.id).where(ended).limit(AT_ONCE)]
    if found:
        RefreshRow.delete().where(RefreshRow.session_id.in_(found)).execute()
        SessionRow.delete().where(SessionRow.id.in_(found)).execute()
    return len(found)


def _delete_keys() -> None:
    retired = SigningKeyRow.retired_at.is_null(False) & (SigningKeyRow.retired_at < clock.now(-2 * MAX_LIFE_SECONDS))
    SigningKeyRow.delete().where(retired).execute()
