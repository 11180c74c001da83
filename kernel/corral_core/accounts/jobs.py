"""Background work of `core`: what is over is swept, a few rows a unit."""

from __future__ import annotations

from collections.abc import Callable

from corral import clock
from corral.database.engine import Work
from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_core.accounts.models import RefreshRow, SessionRow, SigningKeyRow
from corral_core.accounts.service import links, lockout, second_factor, tickets
from corral_core.accounts.service.access_tokens import MAX_LIFE_SECONDS
from corral_core.accounts.service.sessions import Sessions
from corral_core.accounts.settings import REFRESH_GRACE

DAY, HOUR = 86_400.0, 3600.0
AT_ONCE = 500
KEEP_SESSIONS_DAYS = 30


async def purge_sessions(work: Work, sessions: Sessions) -> None:
    """End idle sessions; forget ended ones after 30 days, and what else of signing in is over."""
    await _repeat(work, sessions.expire)
    await _repeat(work, _delete_sessions)
    await _repeat(work, tickets.prune)
    await _repeat(work, links.prune)
    await _repeat(work, second_factor.prune)
    await _repeat(work, lockout.prune)
    await work(_delete_keys)


def forget_successors(settings: Settings) -> None:
    """Sealed refresh tokens are kept for the grace only."""
    over = RefreshRow.successor.is_null(False) & (RefreshRow.used_at <= clock.now(-settings.get(REFRESH_GRACE)))
    RefreshRow.update(successor=None).where(over).execute()


SCHEDULES = (
    Schedule("core.purge_sessions", HOUR, purge_sessions),
    Schedule("core.forget_successors", 30.0, forget_successors),
)


async def _repeat(work: Work, sweep: Callable[[], int]) -> None:
    while await work(sweep) >= AT_ONCE:
        continue


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
