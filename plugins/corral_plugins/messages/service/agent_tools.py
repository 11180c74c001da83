"""The tool that agents use to send messages."""

from __future__ import annotations

from typing import Any

from corral.redact.redactor import Redactor, redacting_machine_text
from corral.schema.conversion import convert
from corral_plugins.messages.api import MESSAGE_TYPES, NewMessage
from corral_plugins.messages.service.sending import MessageSending
from corral_plugins.tools.api import Json, Tool, ToolContext, ToolFailure

ID: Json = {"type": "string", "format": "uuid"}
SEND_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "recipient_agent_id": {**ID, "description": "The agent that receives the message."},
        "recipient_user_id": {**ID, "description": "The person who receives the message."},
        "channel": {
            "type": "string",
            "maxLength": 64,
            "description": "The channel whose subscribers receive the message.",
        },
        "subject": {"type": "string", "maxLength": 200},
        "body": {"type": "string", "minLength": 1, "maxLength": 65_536},
        "type": {
            "enum": list(MESSAGE_TYPES),
            "description": "The type of the message. Messages of the types request and handoff ask for an "
            "acknowledgement.",
        },
        "in_reply_to": {**ID, "description": "The message that this one answers, which acknowledges it."},
        "expires_at": {"type": "string", "format": "date-time"},
    },
    "required": ["body"],
    "additionalProperties": False,
}


class MessageTools:
    """The tools that the `messages` plugin contributes.

    The plugin creates this object before the services exist, and calls `set_implementation` later.
    """

    def __init__(self) -> None:
        self._sending: MessageSending | None = None
        self._redactor: Redactor | None = None

    def set_implementation(self, sending: MessageSending, redactor: Redactor) -> None:
        """Set the services that the tools use."""
        self._sending, self._redactor = sending, redactor

    def all(self) -> list[Tool]:
        """Return all tools."""
        return [
            Tool(
                name="messages.send",
                title="Send a message",
                description="Send a message to an agent, a person or a channel. Name exactly one recipient.",
                risk="write",
                schema=SEND_SCHEMA,
                permission="messages.write",
                run=self._send,
            )
        ]

    def _send(self, context: ToolContext, arguments: Json) -> Json:
        """Send a message on behalf of the calling agent.

        Runs in the unit of work that stores the tool call's result.
        """
        if self._sending is None or self._redactor is None:
            raise ToolFailure("unavailable", "The server is starting; try again.")
        with redacting_machine_text("task", context.task_id):
            redacted: dict[str, Any] = self._redactor.redact_json(arguments)
        row, warnings = self._sending.send(convert(NewMessage, redacted), by=context.caller)
        return {"message_id": row.id, "thread_id": row.thread_id, "warnings": warnings}
