"""Background work of `core`: what is over is swept, a few rows a unit."""

from __future__ import annotations

from collections.abc import Callable

from corral import clock
from corral.auth.models import RefreshRow, SessionRow, SigningKeyRow
from corral.auth.tokens import MAX_LIFE_SECONDS
from corral.core import links, lockout, mfa, tickets
from corral.core.declarations import REFRESH_GRACE
from corral.core.sessions import Sessions
from corral.database.engine import Work
from corral.events import log as event_log
from corral.events.consumers import slowest_cursor
from corral.http import idempotency
from corral.jobs import runner
from corral.jobs.job import Schedule
from corral.kernel_settings import JOBS_RETENTION_DAYS, MAX_ROWS, RETENTION_DAYS
from corral.plugin import Settings

DAY, HOUR = 86_400.0, 3600.0
AT_ONCE = 500
KEEP_SESSIONS_DAYS = 30
LAGGARD_DAYS = 7  # a consumer further behind than this no longer holds the log back


async def purge_sessions(work: Work, sessions: Sessions) -> None:
    """End idle sessions; forget ended ones after 30 days, and what else of signing in is over."""
    await _repeat(work, sessions.expire)
    await _repeat(work, _delete_sessions)
    await _repeat(work, tickets.prune)
    await _repeat(work, links.prune)
    await _repeat(work, mfa.prune)
    await _repeat(work, lockout.prune)
    await work(_delete_keys)


async def prune_events(work: Work, settings: Settings) -> None:
    """Shorten the log to what the settings keep, never past a consumer that is still following."""
    days, rows = settings.get(RETENTION_DAYS), settings.get(MAX_ROWS)

    def prune() -> int:
        slowest = slowest_cursor()
        following = 2**62 if slowest is None else slowest + 1
        swept = event_log.prune(clock.now(-days * DAY), following, rows)
        return swept or event_log.prune(clock.now(-max(days, LAGGARD_DAYS) * DAY), 2**62, 2**62)

    await _repeat(work, prune)


async def prune_jobs(work: Work, settings: Settings) -> None:
    """Forget ended jobs and kept answers of keyed requests."""
    before = clock.now(-settings.get(JOBS_RETENTION_DAYS) * DAY)
    await _repeat(work, lambda: runner.prune(before))
    await _repeat(work, idempotency.prune)


def forget_successors(settings: Settings) -> None:
    """Sealed refresh tokens are kept for the grace only."""
    over = RefreshRow.successor.is_null(False) & (RefreshRow.used_at <= clock.now(-settings.get(REFRESH_GRACE)))
    RefreshRow.update(successor=None).where(over).execute()


SCHEDULES = (
    Schedule("core.purge_sessions", HOUR, purge_sessions),
    Schedule("core.forget_successors", 30.0, forget_successors),
    Schedule("events.prune", HOUR, prune_events),
    Schedule("jobs.prune", HOUR, prune_jobs),
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
