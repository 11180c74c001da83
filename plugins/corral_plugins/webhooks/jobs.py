"""Background jobs of the `webhooks` plugin."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.consumers import Subscriber
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule, enqueue
from corral.plugin import Settings
from corral_plugins.webhooks.models import Webhook
from corral_plugins.webhooks.service.claims import DeliveryClaims
from corral_plugins.webhooks.service.deliveries import (
    RECOVER_JOB,
    delete_batch,
    delete_batch_of,
    end_recovery,
    recover_batch,
)
from corral_plugins.webhooks.service.disabling import AT_ONCE, CANCEL_JOB, cancel_batch, cancel_stranded
from corral_plugins.webhooks.service.fan_out import WebhookFanOut
from corral_plugins.webhooks.service.management import delete_webhooks
from corral_plugins.webhooks.settings import RETENTION_DAYS

DAY = 86_400
DELETE_JOB = "webhooks.delete_deliveries"


async def reap(database: Database, claims: DeliveryClaims, fan_out: WebhookFanOut) -> None:
    """Release deliveries claimed by dead processes, and advance the log position past events without subscribers."""
    entry = UnitContext(label="job webhooks.reap", actor=SYSTEM)
    if await database.read(claims.has_expired, entry):
        await database.work(claims.release_expired, entry=entry)
    await fan_out.handle_new_events()


async def purge_deliveries(work: Work, settings: Settings) -> None:
    """Delete old finished deliveries, and cancel open deliveries of webhooks that are disabled or deleted."""
    while await work(cancel_stranded) == AT_ONCE:
        continue
    before = clock.now(-settings.get(RETENTION_DAYS) * DAY)
    while await work(lambda: delete_batch(before)) == AT_ONCE:
        continue


async def cancel_deliveries(webhook_id: str, until: str, work: Work) -> None:
    """Cancel the remaining open deliveries of a webhook that was disabled or deleted at the time `until`."""
    while await work(lambda: cancel_batch(webhook_id, until)) == AT_ONCE:
        continue


async def recover_deliveries(webhook_id: str, since: str, until: str, work: Work) -> None:
    """Resend the rest of the failed and cancelled deliveries that a person has asked to recover."""
    while await work(lambda: recover_batch(webhook_id, since, until)) == AT_ONCE:
        continue
    await work(lambda: end_recovery(webhook_id))


async def delete_deliveries(webhook_ids: list[str], work: Work) -> None:
    """Delete the deliveries of a purged user's webhooks."""
    while await work(lambda: delete_batch_of(webhook_ids)) == AT_ONCE:
        continue


def delete_webhooks_of_purged_user(event: LoggedEvent) -> None:
    """Delete the webhooks of a purged user, and enqueue the deletion of their deliveries."""
    rows = list(Webhook.select().where(Webhook.user_id == event.object_id))
    if rows:
        delete_webhooks(rows)
        enqueue(DELETE_JOB, webhook_ids=[row.id for row in rows])


JOBS = (
    Job(CANCEL_JOB, cancel_deliveries),
    Job(RECOVER_JOB, recover_deliveries),
    Job(DELETE_JOB, delete_deliveries),
)
SCHEDULES = (Schedule("webhooks.reap", 10.0, reap), Schedule("webhooks.purge", DAY, purge_deliveries))
SUBSCRIBERS = (Subscriber("webhooks.users", ("user.purged",), delete_webhooks_of_purged_user),)
