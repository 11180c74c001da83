"""Delivers messages to agents, and makes them available again if an attempt ends without completing.

A request that nobody acknowledges is delivered again a limited number of times. Expired messages are never delivered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import peewee

from corral import clock
from corral.database.statement import Statement
from corral.plugin import Settings
from corral_plugins.messages import settings as declared
from corral_plugins.messages.api import NO_MESSAGES, ClaimedMessages
from corral_plugins.messages.models import Message, Receipt
from corral_plugins.messages.service import rows
from corral_plugins.messages.service.metrics import MessageMetrics

MAX_REDELIVERIES = 5
"""The maximum number of times that an unacknowledged request is redelivered.

The partial index `given_up` of the receipts contains the same number in its condition.
"""

_DUE = Statement(
    lambda p: (
        Receipt.select(Receipt.id, Receipt.message_id)
        .where(
            (Receipt.agent_id == p("agent"))
            & (Receipt.due_at <= p("now"))
            & (Receipt.expires_at > p("now"))
            & (Receipt.redeliveries < MAX_REDELIVERIES)
        )
        .order_by(Receipt.rank, Receipt.message_id)
        .limit(p("limit"))
        .tuples()
    )
)
_OF_LEASE = Statement(
    lambda p: Receipt.select(Receipt.message_id).where(Receipt.lease_id == p("lease")).order_by(Receipt.id).tuples()
)
_IS_FIRST = Receipt.status == "sent"


class MessageDelivery:
    """Delivers messages. Every method runs in the caller's unit of work."""

    def __init__(self, settings: Settings, metrics: MessageMetrics) -> None:
        self._settings, self._metrics = settings, metrics

    def deliver(self, agent_id: str, *, limit: int, lease_id: str | None) -> list[tuple[Message, Receipt]]:
        """Deliver at most `limit` of the messages that are due for delivery to an agent.

        Requests are delivered first, and older messages before newer ones.

        `lease_id` is the lease of the attempt that receives the messages, or None if there is none.
        """
        due = _DUE.rows({"agent": agent_id, "now": clock.now(), "limit": limit}) if limit else []
        return self._deliver(due, lease_id)

    def deliver_now(self, agent_id: str, message_ids: Sequence[str], *, lease_id: str | None) -> None:
        """Deliver the given messages to the agent. Messages that are not due for delivery are ignored."""
        of_agent = (Receipt.agent_id == agent_id) & Receipt.message_id.in_(list(message_ids))
        due: Any = Receipt.select(Receipt.id, Receipt.message_id).where(of_agent & (Receipt.due_at <= clock.now()))
        self._deliver(list(due.tuples()), lease_id)

    def _deliver(self, due: list[tuple[str, str]], lease_id: str | None) -> list[tuple[Message, Receipt]]:
        """Deliver the given messages. `due` contains the receipt id and the message id of each.

        Messages that are no longer due for delivery are ignored.
        """
        if not due:
            return []
        messages = rows.lock_messages(message_id for _, message_id in due)
        delivered = self._mark_delivered([receipt_id for receipt_id, _ in due], lease_id)
        rows.refresh_status([receipt.message_id for receipt in delivered])
        found = [(messages[each.message_id], each) for each in delivered if each.message_id in messages]
        return sorted(found, key=lambda pair: (pair[1].rank, pair[1].message_id))

    def _mark_delivered(self, receipt_ids: list[str], lease_id: str | None) -> list[Receipt]:
        """Mark the receipts that are still due for delivery as delivered, and return them."""
        now, again = clock.now(), clock.now(self._settings.get(declared.REDELIVER_SECONDS))
        still_due = (Receipt.due_at <= now) & (Receipt.redeliveries < MAX_REDELIVERIES)
        changes: dict[Any, Any] = {
            Receipt.status: peewee.Case(None, ((_IS_FIRST, "delivered"),), Receipt.status),
            Receipt.redeliveries: peewee.Case(None, ((_IS_FIRST, Receipt.redeliveries),), Receipt.redeliveries + 1),
            Receipt.delivered_at: peewee.fn.COALESCE(Receipt.delivered_at, now),
            Receipt.due_at: peewee.Case(None, ((Receipt.expects_ack, again),), None),
            Receipt.lease_id: lease_id,
        }
        update = Receipt.update(changes).where(Receipt.id.in_(receipt_ids) & still_due)
        delivered: list[Receipt] = list(update.returning(Receipt).execute())
        for each in delivered:
            if each.delivered_at == now:
                self._metrics.observe_delivery(clock.elapsed_ms(each.created_at, now))
        return delivered

    def for_claim(self, agent_id: str, *, lease_id: str, requester_id: str | None) -> ClaimedMessages:
        """Deliver messages to an agent that is claiming a task. Implements `Messages.for_claim`."""
        limit = self._settings.get(declared.CONTEXT_LIMIT)
        delivered = self.deliver(agent_id, limit=limit, lease_id=lease_id)
        if not delivered:
            return NO_MESSAGES
        untrusted = untrusted_sources([row for row, _ in delivered], requester_id)
        return ClaimedMessages(items=[_quoted(row, each) for row, each in delivered], untrusted=tuple(untrusted))

    def put_back(self, lease_id: str) -> None:
        """Make the messages that were delivered under a lease available again. Implements `Messages.put_back`.

        If the delivery was a redelivery of a request, `redeliveries` is decreased by 1. If it was the first delivery of
        a message that has not been read, the status becomes `sent` again.
        """
        found = _OF_LEASE.rows({"lease": lease_id})
        if not found:
            return
        ids = [message_id for (message_id,) in found]
        rows.lock_messages(ids)
        now, of_lease = clock.now(), Receipt.lease_id == lease_id
        again = of_lease & (Receipt.redeliveries > 0) & Receipt.status.in_(("delivered", "read"))
        Receipt.update(due_at=now, redeliveries=Receipt.redeliveries - 1, lease_id=None).where(again).execute()
        first = of_lease & (Receipt.redeliveries == 0) & (Receipt.status == "delivered")
        Receipt.update(status="sent", delivered_at=None, due_at=now, lease_id=None).where(first).execute()
        rows.refresh_status(ids)


def untrusted_sources(messages: Iterable[Message], requester_id: str | None) -> list[str]:
    """Return `message:<id>` for each message that taints the run that receives it.

    These are all messages except trusted ones whose sender is the requester of the task.
    """
    return [
        f"message:{row.id}"
        for row in messages
        if row.trust != "trusted" or requester_id is None or row.sender_user_id != requester_id
    ]


def _quoted(row: Message, receipt: Receipt) -> dict[str, Any]:
    """Return a message in the form that a model receives: as data that includes the sender and the trust level."""
    sender = {"type": "agent", "id": row.sender_agent_id} if row.sender_agent_id else _user_reference(row)
    return {
        "id": row.id,
        "thread_id": row.thread_id,
        "in_reply_to": row.in_reply_to,
        "type": row.type,
        "sender": {**sender, "name": row.sender_name},
        "trust": row.trust,
        "channel": row.channel,
        "subject": row.subject,
        "body": row.body,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "redeliveries": receipt.redeliveries,
    }


def _user_reference(row: Message) -> dict[str, str | None]:
    return {"type": "user", "id": row.sender_user_id}
