"""The `Messages` service, which other plugins call. It delegates to the other modules of this plugin."""

from __future__ import annotations

from collections.abc import Iterable

from corral.auth.principal import Principal
from corral_plugins.messages.api import ClaimedMessages, NewMessage, SentMessage
from corral_plugins.messages.models import Message
from corral_plugins.messages.service.delivery import MessageDelivery
from corral_plugins.messages.service.sending import MessageSending


class MessagesService:
    """Implements `corral_plugins.messages.api.Messages`."""

    def __init__(self, sending: MessageSending, delivery: MessageDelivery) -> None:
        self._sending, self._delivery = sending, delivery

    def send(
        self, new: NewMessage, *, by: Principal, trusted: bool | None = None, cause: tuple[str, ...] | None = None
    ) -> SentMessage:
        row, warnings = self._sending.send(new, by=by, trusted=trusted, cause=cause)
        return SentMessage(id=row.id, thread_id=row.thread_id, warnings=warnings)

    def for_claim(self, agent_id: str, *, lease_id: str, requester_id: str | None) -> ClaimedMessages:
        return self._delivery.for_claim(agent_id, lease_id=lease_id, requester_id=requester_id)

    def put_back(self, lease_id: str) -> None:
        self._delivery.put_back(lease_id)

    def texts(self, message_ids: Iterable[str]) -> dict[str, str]:
        rows = Message.select(Message.id, Message.subject, Message.body).where(Message.id.in_(list(message_ids)))
        return {row.id: f"{row.subject}\n{row.body}" for row in rows}
