"""Background jobs of the vault.

The jobs send expiry reminders, delete expired data, and rewrap encrypted rows under a new master key.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext, locked
from corral.jobs.job import Job, Schedule, enqueue
from corral.plugin import Audit, Settings
from corral_plugins.secrets.api import SecretExpiring
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service import alerts, rows
from corral_plugins.secrets.service.master_key_rotation import JOB, MasterKeyRotation
from corral_plugins.secrets.settings import DELETED_DAYS, REMINDER_DAYS

DAY, HOUR = 86_400, 3600
BATCH_SIZE = 50  # each item writes an audit row or an event


async def remind_of_expiry(work: Work, settings: Settings) -> None:
    """Publish reminders about expiring secrets.

    Reminders are published on each of the configured days before a secret expires, and when it expires.
    """
    days = sorted({*settings.get(REMINDER_DAYS), 0})
    await _repeat_in_batches(work, "remind", lambda: _remind_batch(days))


async def shred_deleted_secrets(work: Work, settings: Settings, audit: Audit | None) -> None:
    """Delete the values of deleted secrets, and the keys that encrypt them, after the retention period.

    This job also deletes the records of old alerts.
    """
    before = clock.now(-settings.get(DELETED_DAYS) * DAY)
    await _repeat_in_batches(work, "shred", lambda: _shred_batch(before, audit))
    await _repeat_in_batches(work, "shred", lambda: alerts.delete_old_alerts(BATCH_SIZE))


async def rewrap_rows(holder: str, keys: MasterKeyRotation, work: Work) -> None:
    """Rewrap encrypted rows under the active master key for a limited time. Enqueue another job if rows remain."""
    if not await keys.rewrap_rows(holder):
        await work(lambda: enqueue(JOB, holder=holder))


JOBS = (Job(JOB, rewrap_rows, lease_seconds=60),)
SCHEDULES = (Schedule("secrets.remind", HOUR, remind_of_expiry), Schedule("secrets.shred", DAY, shred_deleted_secrets))


async def _repeat_in_batches(work: Work, what: str, some: Callable[[], int]) -> None:
    entry = UnitContext(label=f"job secrets.{what}", actor=SYSTEM)
    while await work(some, entry=entry) >= BATCH_SIZE:
        continue


def _remind_batch(days: list[int]) -> int:
    """Publish one batch of reminders.

    Each reminder is recorded with a conditional UPDATE, so concurrent runs publish it only once.
    """
    due = _no_rows()
    for day in days:
        reached = SecretRow.expires_at <= clock.now(day * DAY)
        due |= reached & (SecretRow.reminded_days.is_null() | (SecretRow.reminded_days > day))
    live = SecretRow.deleted_at.is_null() & SecretRow.expires_at.is_null(False)
    found = list(SecretRow.select().where(live & due).order_by(SecretRow.expires_at, SecretRow.id).limit(BATCH_SIZE))
    now = clock.time_s()
    for row in found:
        left = max(0.0, (clock.parse_instant(row.expires_at) - now) / DAY)
        day = next(each for each in days if left <= each)
        same = (SecretRow.id == row.id) & (SecretRow.expires_at == row.expires_at)
        earlier = SecretRow.reminded_days.is_null() | (SecretRow.reminded_days > day)
        if SecretRow.update(reminded_days=day).where(same & earlier).execute():
            rows.publish_event(SecretExpiring, row, None, days_left=math.ceil(left))
    return len(found)


def _no_rows() -> object:
    return SecretRow.id.is_null()


def _shred_batch(before: str, audit: Audit | None) -> int:
    old = SecretRow.deleted_at.is_null(False) & (SecretRow.deleted_at < before)
    found = list(
        locked(SecretRow.select().where(old).limit(BATCH_SIZE))
    )  # locked, because a concurrent request may restore a secret
    if found:
        ids = [row.id for row in found]
        SecretVersion.delete().where(SecretVersion.secret_id.in_(ids)).execute()
        SecretRow.delete().where(SecretRow.id.in_(ids)).execute()
    for row in found:
        rows.record_audit(audit, "shred", row)
    return len(found)
