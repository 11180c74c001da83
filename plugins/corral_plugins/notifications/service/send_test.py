"""Sends a test notification through a channel, while an admin waits for the result. Runs outside units of work."""

from __future__ import annotations

import time

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.ids import new_id
from corral_plugins.circuit_breakers.api import CircuitOpen
from corral_plugins.notifications.api import OutgoingItem, SendResult
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.channel_types import ChannelTypeRegistry
from corral_plugins.notifications.service.fan_out import CAUSE
from corral_plugins.notifications.service.outcomes import DeliveryOutcomes
from corral_plugins.notifications.service.outgoing_messages import OutgoingMessages
from corral_plugins.notifications.service.sender import ChannelSender
from corral_plugins.notifications.shapes import ChannelTest

TEST_EVENT = "notification.test"
ENTRY = UnitContext(label="notifications.test", actor=SYSTEM, cause=(CAUSE,))


class ChannelTester:
    """Sends test notifications, without retries, and records the results in the state of the channel."""

    def __init__(
        self,
        work: Work,
        sender: ChannelSender,
        types: ChannelTypeRegistry,
        messages: OutgoingMessages,
        outcomes: DeliveryOutcomes,
    ) -> None:
        self._work, self._sender, self._types, self._messages = work, sender, types, messages
        self._outcomes = outcomes

    async def send(self, row: Channel, address: str) -> ChannelTest:
        """Send a test notification, and return the result.

        If the channel notifies each recipient separately, the test notification goes to `address`.
        """
        began = time.monotonic()
        result = await self._send(row, address if row.config.get("to_recipients") else None)
        return ChannelTest(
            delivered=result.error is None,
            duration_ms=round((time.monotonic() - began) * 1000),
            error=result.error,
        )

    async def _send(self, row: Channel, to: str | None) -> SendResult:
        kind = self._types.find(row.type)
        if kind is None:
            return SendResult(error="The plugin that offers this type of channel is not active.")
        item = OutgoingItem(
            event_id=None,
            event=TEST_EVENT,
            title=f"Test of the channel {row.name}",
            body="This is a test. If you can read it, the channel works.",
            href=None,
            at=clock.now(),
        )
        facts = {"id": new_id(), "severity": "info", "count": 1, "created_at": clock.now()}
        try:
            result = await self._sender.send(row, kind, self._messages.build(facts, [item], to=to))
        except CircuitOpen:
            return SendResult(error="circuit_open")
        await self._work(lambda: self._outcomes.record_test(row.id, kind, result), entry=ENTRY)
        return result
