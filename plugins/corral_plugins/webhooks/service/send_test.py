"""Sends a test message to a webhook while the webhook's owner waits for the result. Runs outside units of work."""

from __future__ import annotations

from msgspec import UNSET

from corral import clock
from corral.ids import new_id
from corral.plugin import Settings
from corral_plugins.circuit_breakers.api import CircuitOpen
from corral_plugins.webhooks.models import Webhook
from corral_plugins.webhooks.service.payloads import TEST_EVENT, WebhookEvents, body_of
from corral_plugins.webhooks.service.sender import AttemptResult, WebhookSender
from corral_plugins.webhooks.settings import TIMEOUT_SECONDS
from corral_plugins.webhooks.shapes import TestWebhook, WebhookTest


class WebhookTester:
    """Sends test messages. They are neither recorded nor retried, and their failures never disable the webhook."""

    def __init__(self, settings: Settings, sender: WebhookSender, events: WebhookEvents) -> None:
        self._settings, self._sender, self._events = settings, sender, events

    async def send(self, row: Webhook, body: TestWebhook) -> WebhookTest:
        """Send a test message, and return the result."""
        name, data = TEST_EVENT, {"webhook_id": row.id}
        if body.event is not UNSET:
            name, data = body.event, self._events.example(body.event)
        message_id = new_id()
        payload = body_of(type=name, timestamp=clock.now(), id=message_id, data=data, object_id=row.id)
        seconds = self._settings.get(TIMEOUT_SECONDS)
        try:
            result = await self._sender.send(row, message_id=message_id, payload=payload, timeout_seconds=seconds)
        except CircuitOpen:
            result = AttemptResult(error="circuit_open")
        return WebhookTest(
            delivered=result.is_success,
            status_code=result.status_code,
            duration_ms=result.duration_ms,
            error=result.error,
            response=result.response,
        )
