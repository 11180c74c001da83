"""The action `call_webhook`, which lets triggers send data to one of their owner's webhooks."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.database.model import PRIVATE
from corral.errors import Invalid
from corral.ids import new_id
from corral.redact.redactor import Redactor
from corral_plugins.triggers.api import FireContext, TriggerAction
from corral_plugins.webhooks.models import Delivery, Webhook
from corral_plugins.webhooks.service.payloads import body_of

Json = dict[str, Any]
CALL_EVENT = "trigger.call_webhook"
SCHEMA: Json = {
    "type": "object",
    "properties": {"webhook_id": {"type": "string", "format": "uuid"}, "data": {"type": "object"}},
    "required": ["webhook_id"],
    "additionalProperties": False,
}


class WebhookTriggerAction:
    """Sends data to webhooks for triggers. The plugin sets the redactor with `set_implementation`."""

    def __init__(self) -> None:
        self._redactor: Redactor | None = None

    def set_implementation(self, redactor: Redactor) -> None:
        """Set the service that the action uses."""
        self._redactor = redactor

    def definition(self) -> TriggerAction:
        """Return the definition of the action."""
        return TriggerAction(
            type="call_webhook",
            title="Send data to a webhook",
            schema=SCHEMA,
            example={
                "webhook_id": "01890a5d-ac96-774b-bcce-b302099a8057",
                "data": {"title": "{{ payload.title }}"},
            },
            permission="webhooks.write",
            run=self._call,
            check=_check,
        )

    def _call(self, context: FireContext, fields: Json) -> Json:
        """Insert a delivery, which is then sent in the same way as the delivery of an event."""
        row, now, delivery_id = _find(fields["webhook_id"], context.owner), clock.now(), new_id()
        data = fields.get("data", {})
        data = data if self._redactor is None else self._redactor.redact_json(data)
        Delivery.insert(
            id=delivery_id,
            webhook_id=row.id,
            event_id=context.history_id,
            event=CALL_EVENT,
            subject={
                "object_type": "trigger",
                "object_id": context.trigger_id,
                "owner_id": row.user_id,
                "visibility": PRIVATE,
            },
            payload=body_of(
                type=CALL_EVENT,
                timestamp=now,
                id=context.history_id,
                data=data,
                object_id=context.trigger_id,
                href=f"/api/v1/triggers/{context.trigger_id}",
            ),
            next_attempt_at=now,
            due_at=now,
            created_at=now,
        ).on_conflict_ignore().execute()
        return {"delivery_id": delivery_id}


def _check(caller: Principal, fields: Json) -> None:
    """Raise `Invalid` unless the action refers to one of the caller's active webhooks."""
    if "webhook_id" in fields:
        _find(fields["webhook_id"], caller)


def _find(webhook_id: Any, owner: Principal) -> Webhook:
    mine = (Webhook.id == str(webhook_id).lower()) & (Webhook.user_id == owner.user_id) & Webhook.is_active
    row: Webhook | None = Webhook.get_or_none(mine)
    if row is None:
        detail = "You have no active webhook with this id."
        raise Invalid.at("/webhook_id", "unknown_reference", detail, problem="unknown_reference")
    return row
