"""Marks messages as read or acknowledged by a recipient, deletes unread messages, and expires old messages."""

from __future__ import annotations

from typing import Any

from peewee import SQL

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.errors import Conflict, Forbidden, Invalid
from corral_plugins.agents.api import Agents
from corral_plugins.messages.api import MessageAcknowledged, MessageDeleted, MessageRead
from corral_plugins.messages.models import OPEN, Message, Receipt
from corral_plugins.messages.service import rows
from corral_plugins.messages.service.delivery import MAX_REDELIVERIES
from corral_plugins.messages.shapes import AcknowledgeMessage, MessageView
from corral_plugins.tasks.api import Tasks

BATCH_SIZE = 200


class MessageReceipts:
    """Changes receipts. Every method runs in the caller's unit of work."""

    tasks: Tasks | None

    def __init__(self, agents: Agents) -> None:
        self._agents = agents

    # -- read and acknowledged

    def mark_read(self, message_id: str, agent_id: str | None, *, by: Principal) -> MessageView:
        """Mark a message as read by a recipient. Repeated calls have no effect."""
        row, receipt = self._lock_receipt(message_id, agent_id, by)
        if receipt.status in ("sent", "delivered"):
            now = clock.now()
            due_at = receipt.due_at if receipt.expects_ack and receipt.status == "delivered" else None
            changes = {"status": "read", "read_at": now, "delivered_at": receipt.delivered_at or now, "due_at": due_at}
            self._change(row, receipt, changes)
            causes = rows.causes_of(self.tasks, by)
            rows.publish_message_event(MessageRead, row, causes, by=rows.recipient_of(receipt))
        return rows.view_of(Message.get_by_id(row.id))

    def acknowledge(self, message_id: str, asked: AcknowledgeMessage, *, by: Principal) -> MessageView:
        """Acknowledge a message for a recipient. A repeated call with the same result has no effect.

        Raise `Conflict` with the code `already_decided` if the recipient has acknowledged the message with a different
        result.
        """
        row, receipt = self._lock_receipt(message_id, asked.agent_id, by)
        if receipt.status == "acked":
            if receipt.result != asked.result:
                detail = f"The message was already acknowledged with the result {receipt.result}."
                raise Conflict(detail, code="already_decided", current_status="acked")
            return rows.view_of(row)
        now = clock.now()
        changes = {
            "status": "acked",
            "acked_at": now,
            "read_at": receipt.read_at or now,
            "delivered_at": receipt.delivered_at or now,
            "result": asked.result,
            "note": asked.note,
            "due_at": None,
        }
        self._change(row, receipt, changes)
        whose, causes = rows.recipient_of(receipt), rows.causes_of(self.tasks, by)
        rows.publish_message_event(MessageAcknowledged, row, causes, by=whose, result=asked.result)
        return rows.view_of(Message.get_by_id(row.id))

    def _change(self, row: Message, receipt: Receipt, changes: dict[str, Any]) -> None:
        """Change a receipt of a locked message, and update the message's status."""
        Receipt.update(changes).where((Receipt.id == receipt.id) & (Receipt.status == receipt.status)).execute()
        rows.refresh_status([row.id])

    def _lock_receipt(self, message_id: str, agent_id: str | None, by: Principal) -> tuple[Message, Receipt]:
        """Lock a message, and return it with the receipt on which the caller may act.

        Raise `Conflict` if the receipt has expired, `Forbidden` if the caller is not allowed to act on any receipt, and
        `Invalid` if the caller may act on several receipts and `agent_id` does not select one.
        """
        rows.find_readable_message(message_id, by)
        row = rows.lock_messages([message_id]).get(message_id) or rows.find_readable_message(message_id, by)
        receipt = self._choose_receipt(rows.receipts_of(row.id), agent_id, by)
        if rows.current_status(receipt.status, receipt.expires_at) == "expired":
            raise Conflict("The message has expired.", current_status="expired")
        return row, receipt

    def _choose_receipt(self, receipts: list[Receipt], agent_id: str | None, by: Principal) -> Receipt:
        if agent_id is not None:
            agent_id = agent_id.lower()
            if by.agent_id is not None and agent_id != by.agent_id:
                raise Forbidden("An agent can act only for itself; leave agent_id out.")
            if not any(each.agent_id == agent_id for each in receipts):
                raise Invalid.at(
                    "/agent_id", "unknown_reference", "This agent is not a recipient.", problem="unknown_reference"
                )
            receipts = [each for each in receipts if each.agent_id == agent_id]
        own = self._own_receipts(receipts, by)
        if not own:
            raise Forbidden(
                "Only a recipient, the owner of a recipient agent or an admin may read or acknowledge the message."
            )
        if len(own) > 1:
            raise Invalid.at(
                "/agent_id", "required", "You may act for several recipients of this message; name one of them."
            )
        return own[0]

    def _own_receipts(self, receipts: list[Receipt], by: Principal) -> list[Receipt]:
        """Return the receipts on which the caller may act.

        If the caller has receipts of their own, these are returned. Otherwise, admins may act on all receipts, and
        other users on the receipts of agents that they own.
        """
        if by.agent_id is not None:
            return [each for each in receipts if each.agent_id == by.agent_id]
        own = [each for each in receipts if each.user_id is not None and each.user_id == by.user_id]
        if own or by.is_admin:
            return own or receipts
        agents = self._agents.find_many([each.agent_id for each in receipts if each.agent_id is not None])
        owned = {agent.id for agent in agents.values() if agent.owner_id == by.user_id}
        return [each for each in receipts if each.agent_id in owned]

    # -- deletion

    def delete(self, message_id: str, *, by: Principal) -> None:
        """Delete a message that no recipient has read.

        Only the sender, the person with whose rights the message was sent, and admins may do this. Raise `Forbidden`
        for any other caller, `NotFound` if the caller may not read the message, and `Conflict` if a recipient has read
        it.
        """
        rows.find_readable_message(message_id, by)
        row = rows.lock_messages([message_id]).get(message_id) or rows.find_readable_message(message_id, by)
        if by.agent_id is None:
            require_owner(by, row.created_by, what="message")
        elif by.agent_id != row.sender_agent_id:
            raise Forbidden("An agent can delete only its own messages.")
        taken = (Receipt.message_id == row.id) & Receipt.status.in_(("read", "acked"))
        if Receipt.select().where(taken).exists():
            raise Conflict("A recipient has read the message, so it cannot be deleted.", current_status="read")
        Receipt.delete().where(Receipt.message_id == row.id).execute()
        Message.delete().where(Message.id == row.id).execute()
        rows.publish_message_event(MessageDeleted, row, rows.causes_of(self.tasks, by))

    # -- expiry

    def expire_batch(self) -> int:
        """Expire up to 200 receipts past their expiry time, and up to 200 not acknowledged after the last redelivery.

        If a request expires without an acknowledgement, its sender is notified once. Return the number of expired
        receipts.
        """
        now = clock.now()
        passed = SQL("status IN ('sent', 'delivered', 'read')") & (Receipt.expires_at <= now)
        given_up = SQL(f"due_at IS NOT NULL AND redeliveries >= {MAX_REDELIVERIES}") & (Receipt.due_at <= now)
        found: dict[str, str] = {}
        for condition in (passed, given_up):
            some: Any = Receipt.select(Receipt.id, Receipt.message_id).where(condition).limit(BATCH_SIZE).tuples()
            found |= dict(list(some))
        if not found:
            return 0
        messages = rows.lock_messages(found.values())
        overdue = (Receipt.expires_at <= now) | ((Receipt.redeliveries >= MAX_REDELIVERIES) & (Receipt.due_at <= now))
        ids = Receipt.id.in_(list(found)) & Receipt.status.in_(OPEN)
        expired: list[Receipt] = list(
            Receipt.update(status="expired", due_at=None).where(ids & overdue).returning(Receipt).execute()
        )
        for each in sorted(expired, key=lambda receipt: receipt.id):
            self._report_expiry(messages.get(each.message_id), each)
        rows.refresh_status([each.message_id for each in expired])
        return len(expired)

    @staticmethod
    def _report_expiry(row: Message | None, receipt: Receipt) -> None:
        if row is None or not receipt.expects_ack or row.reported_expiry:
            return
        row.reported_expiry = True
        Message.update(reported_expiry=True).where(Message.id == row.id).execute()
        rows.publish_message_event(MessageAcknowledged, row, by=rows.recipient_of(receipt), result="expired")
