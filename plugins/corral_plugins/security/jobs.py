"""Background work of security, and the events that it follows."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, Entry
from corral.events.consumers import Subscriber
from corral.events.event import emit
from corral.events.log import Record
from corral.jobs.job import Schedule
from corral_plugins.security.events import ApiKeyExpiring
from corral_plugins.security.models import ApiKeyRow
from corral_plugins.security.service.ip_rules import IpRules
from corral_plugins.security.service.keys import ApiKeys

DAY = 86_400
NOTICE_DAYS = (1, 7)  # the nearest first: who learns of the last day needs no word of the week
KEEP_DAYS = 30
AT_ONCE = 500


async def expire(work: Work, rules: IpRules) -> None:
    """Sweep expired rules, tell owners whose keys end soon, and forget keys that are over for long."""
    entry = Entry(label="job security.expire", actor=SYSTEM)
    await work(rules.sweep, entry=entry)
    for days in NOTICE_DAYS:
        while await work(lambda days=days: remind(days), entry=entry) >= AT_ONCE:  # type: ignore[misc]  # bound per round
            continue
    while await work(_prune, entry=entry) >= AT_ONCE:
        continue


def remind(days: int) -> int:
    """Tell owners of keys that end within so many days, each once; how many."""
    now = clock.now()
    soon = (
        ApiKeyRow.revoked_at.is_null() & (ApiKeyRow.expires_at > now) & (ApiKeyRow.expires_at <= clock.now(days * DAY))
    )
    untold = soon & (ApiKeyRow.reminded.is_null() | (ApiKeyRow.reminded > days))
    found = ApiKeyRow.select(ApiKeyRow.id).where(untold).limit(AT_ONCE)
    told = ApiKeyRow.update(reminded=days).where(ApiKeyRow.id.in_(found) & untold).returning(ApiKeyRow)
    rows = list(told.execute())
    for row in rows:
        emit(ApiKeyExpiring(key_id=row.id, name=row.name), object=("api_key", row.id), owner=row.user_id)
    return len(rows)


def _prune() -> int:
    before = clock.now(-KEEP_DAYS * DAY)
    over = (ApiKeyRow.expires_at < before) | (ApiKeyRow.revoked_at < before)
    return int(
        ApiKeyRow.delete().where(ApiKeyRow.id.in_(ApiKeyRow.select(ApiKeyRow.id).where(over).limit(AT_ONCE))).execute()
    )


def follow_people(event: Record, keys: ApiKeys) -> None:
    """Nothing is kept of a purged person's keys; while deactivated they are refused at each request."""
    keys.delete_of(event.object_id)


SCHEDULES = (Schedule("security.expire", DAY, expire),)
SUBSCRIBERS = (Subscriber("security.people", ("user.purged",), follow_people),)
