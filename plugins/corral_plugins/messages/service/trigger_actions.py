"""The action `send_message`, with which triggers send messages."""

from __future__ import annotations

from typing import Any

from corral.auth.principal import Principal
from corral.errors import Invalid, Unavailable
from corral.redact.redactor import Redactor
from corral.schema.conversion import convert
from corral_plugins.agents.api import Agents
from corral_plugins.messages.api import BODY_BYTES, CHANNEL, NewMessage
from corral_plugins.messages.service.sending import MessageSending
from corral_plugins.triggers.api import FireContext, TriggerAction

Json = dict[str, Any]
AGENT = {"type": ["string", "null"], "format": "uuid"}
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "recipient_agent_id": AGENT,
        "channel": {"type": ["string", "null"], "pattern": CHANNEL},
        "subject": {"type": "string", "maxLength": 200},
        "body": {"type": "string", "minLength": 1, "maxLength": BODY_BYTES},
        "sender_agent_id": AGENT,
    },
    "required": ["body"],
    "additionalProperties": False,
}


class MessageTriggerAction:
    """Sends messages for triggers. The plugin connects it to its services with `set_services`."""

    def __init__(self) -> None:
        self._services: tuple[MessageSending, Agents, Redactor] | None = None

    def set_services(self, sending: MessageSending, agents: Agents, redactor: Redactor) -> None:
        """Connect the action to the services that it calls."""
        self._services = sending, agents, redactor

    def definition(self) -> TriggerAction:
        """Return the definition of the action."""
        return TriggerAction(
            type="send_message",
            title="Send a message",
            schema=SCHEMA,
            example={"channel": "news", "body": "{{ payload.title }} is finished."},
            permission="messages.write",
            run=self.send_message,
            check=self.check_agents,
        )

    def send_message(self, context: FireContext, fields: Json) -> Json:
        """Send a message of the owner, or of the agent that speaks for the owner."""
        sending, _, redactor = self._connected()
        texts: Json = {name: redactor.redact(fields[name]) for name in ("subject", "body") if name in fields}
        new = convert(NewMessage, {**fields, **texts}, pointer_prefix="/action")
        trusted = False if context.tainted else None
        row, _ = sending.send(new, by=context.owner, trusted=trusted, cause=context.cause_chain)
        return {"message_id": row.id}

    def check_agents(self, caller: Principal, fields: Json) -> None:
        """Raise `Invalid` if the action names an agent that does not exist."""
        _, agents, _ = self._connected()
        for name in ("recipient_agent_id", "sender_agent_id"):
            if fields.get(name) is not None and agents.find(fields[name].lower()) is None:
                detail = "There is no agent with this id."
                raise Invalid.at(f"/{name}", "unknown_reference", detail, problem="unknown_reference")

    def _connected(self) -> tuple[MessageSending, Agents, Redactor]:
        if self._services is None:
            raise Unavailable("The server is starting.")
        return self._services
