"""Locks and updates rows of messages and receipts, publishes message events, and builds API representations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.unit import locked
from corral.errors import NotFound
from corral.events.event import emit
from corral_plugins.messages.api import Correlation, MessageEvent
from corral_plugins.messages.models import OPEN, STATUSES, Message, Receipt
from corral_plugins.messages.shapes import MessageItem, MessageView, ReceiptView
from corral_plugins.tasks.api import Tasks

_RANK = peewee.Case(Receipt.status, tuple((status, rank) for rank, status in enumerate(STATUSES)))
_SAME = [
    name
    for name in MessageItem.__struct_fields__
    if name in Message._meta.fields and name not in ("correlation", "status")
]
_RECEIPT_FIELDS = [name for name in ReceiptView.__struct_fields__ if name != "status"]


def find_readable_message(message_id: str, caller: Principal) -> Message:
    """Return a message. Raise `NotFound` if no such message is visible to the caller."""
    row: Message | None = Message.get_or_none((Message.id == message_id) & visible(Message, caller))
    if row is None:
        raise NotFound("There is no message with this id.")
    return row


def lock_messages(message_ids: Iterable[str]) -> dict[str, Message]:
    """Lock the messages with these ids, in the order of their ids, and return those that exist, keyed by id."""
    ids = sorted(set(message_ids))
    if not ids:
        return {}
    found = locked(Message.select().where(Message.id.in_(ids)).order_by(Message.id))
    return {row.id: row for row in found}


def refresh_status(message_ids: Collection[str]) -> None:
    """Set each message's status to the least advanced status of its receipts. The messages must be locked."""
    least: dict[str, list[str]] = defaultdict(list)
    receipts: Any = (
        Receipt.select(Receipt.message_id, peewee.fn.MIN(_RANK))
        .where(Receipt.message_id.in_(list(message_ids)))
        .group_by(Receipt.message_id)
        .tuples()
    )
    for message_id, rank in receipts:
        least[STATUSES[rank]].append(message_id)
    for status, ids in least.items():
        Message.update(status=status).where(Message.id.in_(ids)).execute()


def receipts_of(message_id: str) -> list[Receipt]:
    """Return the receipts of a message. A message has at most 500 receipts."""
    return list(Receipt.select().where(Receipt.message_id == message_id).order_by(Receipt.id))


def recipient_of(receipt: Receipt) -> dict[str, str]:
    """Return the recipient of a receipt in the form `{type, id}`."""
    if receipt.agent_id is not None:
        return {"type": "agent", "id": receipt.agent_id}
    return {"type": "user", "id": receipt.user_id or ""}


def causes_of(tasks: Tasks | None, by: Principal) -> tuple[str, ...] | None:
    """Return the ids of the triggers and tasks that led to the caller's task.

    Triggers use these ids to detect loops that include messages.
    """
    run = tasks.find_run(by.task_id) if tasks is not None and by.task_id is not None else None
    return None if run is None else run.cause_chain or None


def publish_message_event(
    kind: type[MessageEvent], row: Message, /, cause: tuple[str, ...] | None = None, **fields: Any
) -> None:
    """Emit an event about a message. `fields` contains additional fields of the event."""
    event = kind(
        message_id=row.id,
        thread_id=row.thread_id,
        sender_agent_id=row.sender_agent_id,
        sender_user_id=row.sender_user_id,
        recipient_agent_id=row.recipient_agent_id,
        recipient_user_id=row.recipient_user_id,
        channel=row.channel,
        type=row.type,
        subject=row.subject,
        **fields,
    )
    emit(event, object=("message", row.id), owner=row.created_by, cause=cause)


# -- views


def current_status(status: str, expires_at: str) -> str:
    """Return the current status of a message or a receipt.

    The status is `expired` as soon as the expiry time has passed, even if the stored status has not been updated.
    """
    return "expired" if status in OPEN and expires_at <= clock.now() else status


def item_of(row: Message) -> MessageItem:
    """Return a message as it appears in lists."""
    return MessageItem(**_item_fields(row))


def view_of(row: Message) -> MessageView:
    """Return a message with its receipts."""
    return MessageView(**_item_fields(row), receipts=receipt_views(receipts_of(row.id)))


def _item_fields(row: Message) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in _SAME},
        "correlation": msgspec.convert(row.correlation, Correlation),
        "status": current_status(row.status, row.expires_at),
    }


def receipt_views(receipts: Sequence[Receipt]) -> list[ReceiptView]:
    """Return receipts as they appear in the response for a single message."""
    return [
        ReceiptView(
            **{name: getattr(each, name) for name in _RECEIPT_FIELDS},
            status=current_status(each.status, each.expires_at),  # type: ignore[arg-type]  # one of STATUSES
        )
        for each in receipts
    ]
