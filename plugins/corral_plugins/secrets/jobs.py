"""Background work of the vault: reminders, shredding, rewrapping."""

from __future__ import annotations

import math
from collections.abc import Callable

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry, locked
from corral.jobs.job import Job, Schedule, enqueue
from corral.plugin import Audit, Settings
from corral_plugins.secrets.api import SecretExpiring
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service import alarms, rows
from corral_plugins.secrets.service.keys import JOB, MasterKeys
from corral_plugins.secrets.settings import DELETED_DAYS, REMINDER_DAYS

DAY, HOUR = 86_400, 3600
AT_ONCE = 50  # each of them is a row of the audit log, or an event


async def remind(work: Work, settings: Settings) -> None:
    """Tell of secrets that expire: on each of the days once, and when they have expired."""
    days = sorted({*settings.get(REMINDER_DAYS), 0})
    await _repeat(work, "remind", lambda: _remind(days))


async def shred(work: Work, settings: Settings, audit: Audit | None) -> None:
    """Delete, with their keys, the values of secrets that were deleted long enough ago."""
    before = clock.now(-settings.get(DELETED_DAYS) * DAY)
    await _repeat(work, "shred", lambda: _shred(before, audit))
    await _repeat(work, "shred", lambda: alarms.prune(AT_ONCE))


async def rewrap(holder: str, keys: MasterKeys, work: Work) -> None:
    """Give rows the active master key for a while; what is left is another job."""
    if not await keys.run(holder):
        await work(lambda: enqueue(JOB, holder=holder))


JOBS = (Job(JOB, rewrap, seconds=60),)
SCHEDULES = (Schedule("secrets.remind", HOUR, remind), Schedule("secrets.shred", DAY, shred))


async def _repeat(work: Work, what: str, some: Callable[[], int]) -> None:
    entry = Entry(label=f"job secrets.{what}", actor=SYSTEM)
    while await work(some, entry=entry) >= AT_ONCE:
        continue


def _remind(days: list[int]) -> int:
    """The next few; each reminder is one guarded update, so it is given once whoever runs this."""
    due = _nothing()
    for day in days:
        reached = SecretRow.expires_at <= clock.now(day * DAY)
        due |= reached & (SecretRow.reminded_days.is_null() | (SecretRow.reminded_days > day))
    live = SecretRow.deleted_at.is_null() & SecretRow.expires_at.is_null(False)
    found = list(SecretRow.select().where(live & due).order_by(SecretRow.expires_at, SecretRow.id).limit(AT_ONCE))
    now = clock.time_s()
    for row in found:
        left = max(0.0, (clock.parse_instant(row.expires_at) - now) / DAY)
        day = next(each for each in days if left <= each)
        same = (SecretRow.id == row.id) & (SecretRow.expires_at == row.expires_at)
        earlier = SecretRow.reminded_days.is_null() | (SecretRow.reminded_days > day)
        if SecretRow.update(reminded_days=day).where(same & earlier).execute():
            rows.tell(SecretExpiring, row, None, days_left=math.ceil(left))
    return len(found)


def _nothing() -> object:
    return SecretRow.id.is_null()


def _shred(before: str, audit: Audit | None) -> int:
    old = SecretRow.deleted_at.is_null(False) & (SecretRow.deleted_at < before)
    found = list(locked(SecretRow.select().where(old).limit(AT_ONCE)))  # one may just be restored
    if found:
        ids = [row.id for row in found]
        SecretVersion.delete().where(SecretVersion.secret_id.in_(ids)).execute()
        SecretRow.delete().where(SecretRow.id.in_(ids)).execute()
    for row in found:
        rows.note(audit, "shred", row)
    return len(found)
