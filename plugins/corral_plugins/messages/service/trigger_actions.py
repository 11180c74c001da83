"""The action `send_message`, which lets triggers send messages, and the check for untrusted messages."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from corral.auth.principal import Principal
from corral.errors import Unavailable
from corral.redact.redactor import Redactor
from corral.schema.conversion import convert
from corral_plugins.messages.api import NewMessage
from corral_plugins.messages.models import Message
from corral_plugins.messages.service.sending import MessageSending
from corral_plugins.triggers.api import FireContext, TaintCheck, TriggerAction

Json = dict[str, Any]
ID: Json = {"type": "string", "format": "uuid"}
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "recipient_agent_id": ID,
        "channel": {"type": "string", "minLength": 1, "maxLength": 64},
        "sender_agent_id": ID,
        "subject": {"type": "string", "maxLength": 200},
        "body": {"type": "string", "minLength": 1, "maxLength": 65_536},
    },
    "required": ["body"],
    "oneOf": [{"required": ["recipient_agent_id"]}, {"required": ["channel"]}],
    "additionalProperties": False,
}


class MessageTriggerAction:
    """Sends messages for triggers. The plugin sets the required services with `set_implementation`."""

    def __init__(self) -> None:
        self._services: tuple[MessageSending, Redactor] | None = None

    def set_implementation(self, sending: MessageSending, redactor: Redactor) -> None:
        """Set the services that the action uses."""
        self._services = sending, redactor

    def definition(self) -> TriggerAction:
        """Return the definition of the action."""
        return TriggerAction(
            type="send_message",
            title="Send a message",
            schema=SCHEMA,
            example={"channel": "news", "subject": "News", "body": "{{ payload.title }}"},
            permission="messages.write",
            run=self._send,
            check=self._check,
        )

    def _send(self, context: FireContext, fields: Json) -> Json:
        """Send a message on behalf of the trigger's owner, or of the agent that the action specifies."""
        sending, redactor = self._require_services()
        new = convert(NewMessage, redactor.redact_json(fields), pointer_prefix="/action")
        row, _ = sending.send(new, by=context.owner, trusted=not context.tainted, cause=context.cause_chain)
        return {"message_id": row.id}

    def _check(self, caller: Principal, fields: Json) -> None:
        """Raise a `Problem` if the action names agents that the caller cannot use.

        The agents must exist, and the caller must be allowed to send on behalf of the sender agent.
        """
        sending, _ = self._require_services()
        sending.check_agents(fields, by=caller)

    def _require_services(self) -> tuple[MessageSending, Redactor]:
        if self._services is None:
            raise Unavailable("The server is starting; try again.")
        return self._services


def find_tainted(ids: Collection[str]) -> dict[str, bool]:
    """For each of these ids that belongs to a message, return whether the message is untrusted."""
    found: Any = Message.select(Message.id, Message.trust).where(Message.id.in_(list(ids))).tuples()
    return {message_id: trust != "trusted" for message_id, trust in found}


TAINT_CHECK = TaintCheck(type="message", field="message_id", find=find_tainted)
