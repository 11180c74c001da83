"""Background jobs that expire messages and delete old messages."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.consumers import Subscriber
from corral.events.log import LoggedEvent
from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_plugins.messages import settings as declared
from corral_plugins.messages.models import ChannelRow, Message, Receipt, Subscription
from corral_plugins.messages.service.receipts import MessageReceipts

DAY = 86_400
ROUNDS = 50
"""The maximum number of batches in one run of a job. The next scheduled run handles the remaining rows."""
BATCH_SIZE = 500


async def expire_messages(work: Work, receipts: MessageReceipts) -> None:
    """Expire messages past their expiry time, and requests that nobody acknowledged after the last redelivery."""
    entry = UnitContext(label="job messages.sweep", actor=SYSTEM)
    for _ in range(ROUNDS):
        if not await work(receipts.expire_batch, entry=entry):
            break


async def delete_old_messages(work: Work, settings: Settings) -> None:
    """Delete messages past their retention period, and channels without recent messages."""
    days = settings.get(declared.RETENTION_DAYS)
    if days is None:
        return
    entry, before = UnitContext(label="job messages.prune", actor=SYSTEM), clock.now(-days * DAY)
    while await work(lambda: delete_batch(before), entry=entry) == BATCH_SIZE:
        continue


def delete_batch(before: str) -> int:
    """Delete at most 500 messages that were sent before this time. Return the number of deleted messages."""
    old = Message.select(Message.id).where(Message.created_at < before).order_by(Message.created_at).limit(BATCH_SIZE)
    ids = [row.id for row in old]
    if ids:
        Receipt.delete().where(Receipt.message_id.in_(ids)).execute()
        Message.delete().where(Message.id.in_(ids)).execute()
    ChannelRow.delete().where(ChannelRow.last_message_at < before).execute()
    return len(ids)


def unsubscribe_deleted_agent(event: LoggedEvent) -> None:
    """Delete the subscriptions of a deleted agent. Its messages are kept."""
    Subscription.delete().where(Subscription.agent_id == event.object_id).execute()


SCHEDULES = (
    Schedule("messages.sweep", 60, expire_messages),
    Schedule("messages.prune", DAY, delete_old_messages),
)
SUBSCRIBERS = (Subscriber("messages.agents", ("agent.deleted",), unsubscribe_deleted_agent),)
