"""The workflow step that sends a message."""

from __future__ import annotations

from typing import Any

from corral.redact.redactor import Redactor
from corral.schema.conversion import convert
from corral_plugins.messages.api import MESSAGE_TYPES, Correlation, NewMessage
from corral_plugins.messages.service.sending import MessageSending
from corral_plugins.workflows.api import StepContext, StepFailure, StepResult, StepType

Json = dict[str, Any]
ID: Json = {"type": "string", "format": "uuid"}
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "recipient_agent_id": ID,
        "recipient_user_id": ID,
        "channel": {"type": "string", "minLength": 1, "maxLength": 64},
        "sender_agent_id": ID,
        "subject": {"type": "string", "maxLength": 200},
        "body": {"type": "string", "minLength": 1, "maxLength": 65_536},
        "type": {"enum": list(MESSAGE_TYPES)},
    },
    "required": ["body"],
    "oneOf": [{"required": ["recipient_agent_id"]}, {"required": ["recipient_user_id"]}, {"required": ["channel"]}],
    "additionalProperties": False,
}


class MessageSteps:
    """The step types that the `messages` plugin contributes.

    The plugin creates this object before the services exist, and calls `set_implementation` later.
    """

    def __init__(self) -> None:
        self._sending: MessageSending | None = None
        self._redactor: Redactor | None = None

    def set_implementation(self, sending: MessageSending, redactor: Redactor) -> None:
        """Set the services that the step types use."""
        self._sending, self._redactor = sending, redactor

    def all(self) -> list[StepType]:
        """Return all step types."""
        return [
            StepType(
                type="message",
                title="Send a message",
                schema=SCHEMA,
                output_schema={
                    "type": "object",
                    "properties": {"id": ID},
                    "required": ["id"],
                    "additionalProperties": False,
                },
                dispatch=self._send,
            )
        ]

    def _send(self, context: StepContext) -> StepResult:
        """Send a message in the transaction that starts the step. As a result, the message is sent exactly once."""
        if self._sending is None or self._redactor is None:
            raise StepFailure("unavailable", "The server is starting; try again.")
        config: Json = self._redactor.redact_json(context.config)
        new = convert(NewMessage, config)
        new.correlation = Correlation(run_id=context.run_id)
        row, _ = self._sending.send(new, by=context.caller, trusted=not context.tainted)
        return StepResult(output={"id": row.id})
