"""Background jobs of the `notifications` plugin."""

from __future__ import annotations

import functools

from corral import clock
from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.consumers import Subscriber
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule, enqueue
from corral.plugin import Settings
from corral_plugins.notifications.models import Preference
from corral_plugins.notifications.service.claims import DeliveryClaims
from corral_plugins.notifications.service.deliveries import delete_ended, delete_old_groups
from corral_plugins.notifications.service.dispatcher import NotificationDispatcher
from corral_plugins.notifications.service.fan_out import NotificationFanOut
from corral_plugins.notifications.service.inbox import (
    AT_ONCE,
    Position,
    delete_of_user,
    delete_old,
    delete_surplus,
    mark_requests_read,
    users_with_surplus,
)
from corral_plugins.notifications.settings import RETENTION_DAYS, UNREAD_RETENTION_DAYS

DAY = 86_400
GROUP_MEMORY_DAYS = 8  # longer than the longest repeat interval
DELETE_JOB = "notifications.delete_of_user"
ENTRY = UnitContext(label="job notifications.group", actor=SYSTEM)


async def maintain_deliveries(
    database: Database, claims: DeliveryClaims, fan_out: NotificationFanOut, dispatcher: NotificationDispatcher
) -> None:
    """Release deliveries of dead processes, end undeliverable ones, and write notifications about new events."""
    if await database.read(claims.needs_maintenance, ENTRY):
        await database.work(claims.release_expired, entry=ENTRY)
        await database.work(claims.cancel_orphans, entry=ENTRY)
        await database.work(claims.fail_overdue, entry=ENTRY)
        dispatcher.wake()
    await fan_out.handle_new_events()


async def purge(work: Work, settings: Settings, fan_out: NotificationFanOut) -> None:
    """Delete old notifications, notifications in excess of the per-user limit, and deliveries that ended long ago.

    Also write notifications about new events, and delete groups without recent messages.
    """
    await fan_out.handle_new_events(pass_over=True)
    read_before = clock.now(-settings.get(RETENTION_DAYS) * DAY)
    unread_before = clock.now(-settings.get(UNREAD_RETENTION_DAYS) * DAY)
    position: Position | None = ("", "")
    while position is not None:
        position = await work(functools.partial(delete_old, read_before, unread_before, position))
    for user_id, surplus in await work(users_with_surplus, read=True):
        left = surplus
        while left > 0 and (gone := await work(functools.partial(delete_surplus, user_id, left))):
            left -= gone
    while await work(lambda: delete_ended(read_before)) == AT_ONCE:
        continue
    forgotten = clock.now(-GROUP_MEMORY_DAYS * DAY)
    while await work(lambda: delete_old_groups(forgotten)) == AT_ONCE:
        continue


async def delete_notifications(user_id: str, work: Work) -> None:
    """Delete the notifications of a purged user."""
    while await work(lambda: delete_of_user(user_id)) == AT_ONCE:
        continue


def forget_purged_user(event: LoggedEvent) -> None:
    """Delete the preferences of a purged user, and enqueue the deletion of their notifications."""
    Preference.delete().where(Preference.user_id == event.object_id).execute()
    enqueue(DELETE_JOB, user_id=event.object_id)


def read_decided_requests(event: LoggedEvent) -> None:
    """When a person decides on a request, mark as read the notifications that asked this person for the decision."""
    if event.actor_type == "user" and event.actor_id and event.payload().get("change", "decision") == "decision":
        mark_requests_read(event.actor_id, event.object_type, event.object_id)


JOBS = (Job(DELETE_JOB, delete_notifications),)
SCHEDULES = (Schedule("notifications.group", 5.0, maintain_deliveries), Schedule("notifications.purge", DAY, purge))
DECISIONS = (
    *("approval.resolved", "approval.updated"),
    *("code_review.approved", "code_review.rejected", "code_review.changes_requested"),
)
SUBSCRIBERS = (
    Subscriber("notifications.decisions", DECISIONS, read_decided_requests),
    Subscriber("notifications.purged_users", ("user.purged",), forget_purged_user),
)
