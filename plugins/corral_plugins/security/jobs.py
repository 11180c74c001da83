"""Scheduled jobs and event subscribers of the `security` plugin."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.consumers import Subscriber
from corral.events.event import emit
from corral.events.log import LoggedEvent
from corral.jobs.job import Schedule
from corral_plugins.security.api import ApiKeyExpiring
from corral_plugins.security.models import ApiKeyRow
from corral_plugins.security.service.api_keys import ApiKeys
from corral_plugins.security.service.ip_rules import IpRules

DAY = 86_400
NOTICE_DAYS = (1, 7)  # nearest first: an owner notified of the last day needs no notice about the week
RETENTION_DAYS = 30
BATCH_SIZE = 500


async def expire_rules_and_keys(work: Work, rules: IpRules) -> None:
    """Delete expired IP rules and old API keys, and notify the owners of keys that will expire soon.

    A key is deleted 30 days after it expired or was revoked.
    """
    entry = UnitContext(label="job security.expire", actor=SYSTEM)
    await work(rules.delete_expired, entry=entry)
    for days in NOTICE_DAYS:
        while await work(lambda days=days: remind_of_expiring_keys(days), entry=entry) >= BATCH_SIZE:  # type: ignore[misc]  # bound per round
            continue
    while await work(_delete_ended_keys, entry=entry) >= BATCH_SIZE:
        continue


def remind_of_expiring_keys(days: int) -> int:
    """Notify the owners of keys that expire within `days` days. Return the number of notifications.

    Each owner is notified only once for the same key and the same value of `days`.
    """
    now = clock.now()
    soon = (
        ApiKeyRow.revoked_at.is_null() & (ApiKeyRow.expires_at > now) & (ApiKeyRow.expires_at <= clock.now(days * DAY))
    )
    pending = soon & (ApiKeyRow.reminded.is_null() | (ApiKeyRow.reminded > days))
    found = ApiKeyRow.select(ApiKeyRow.id).where(pending).limit(BATCH_SIZE)
    reminded = ApiKeyRow.update(reminded=days).where(ApiKeyRow.id.in_(found) & pending).returning(ApiKeyRow)
    rows = list(reminded.execute())
    for row in rows:
        emit(ApiKeyExpiring(key_id=row.id, name=row.name), object=("api_key", row.id), owner=row.user_id)
    return len(rows)


def _delete_ended_keys() -> int:
    before = clock.now(-RETENTION_DAYS * DAY)
    over = (ApiKeyRow.expires_at < before) | (ApiKeyRow.revoked_at < before)
    return int(
        ApiKeyRow.delete()
        .where(ApiKeyRow.id.in_(ApiKeyRow.select(ApiKeyRow.id).where(over).limit(BATCH_SIZE)))
        .execute()
    )


def delete_keys_of_purged_user(event: LoggedEvent, keys: ApiKeys) -> None:
    """Delete the keys of a purged user.

    Keys of deactivated users are kept, but every request with such a key is rejected.
    """
    keys.delete_keys_of(event.object_id)


SCHEDULES = (Schedule("security.expire", DAY, expire_rules_and_keys),)
SUBSCRIBERS = (Subscriber("security.purged_users", ("user.purged",), delete_keys_of_purged_user),)
