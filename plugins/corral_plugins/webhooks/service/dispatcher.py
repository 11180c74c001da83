"""Delivers events. Each process that runs jobs also reads new events, claims deliveries, and attempts them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import NamedTuple

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Problem, Unavailable
from corral.events.live_feed import Feed
from corral.events.log import LoggedEvent
from corral.jobs.runner import JobRunner
from corral_core.event_log.api import EventDispatcher
from corral_plugins.circuit_breakers.api import CircuitOpen
from corral_plugins.webhooks.models import Webhook
from corral_plugins.webhooks.service.claims import ClaimedDelivery, DeliveryClaims
from corral_plugins.webhooks.service.fan_out import WebhookFanOut, followed_patterns
from corral_plugins.webhooks.service.metrics import WebhookMetrics
from corral_plugins.webhooks.service.outcomes import DeliveryOutcomes
from corral_plugins.webhooks.service.payloads import matching_patterns
from corral_plugins.webhooks.service.sender import AttemptResult, WebhookSender

log = logging.getLogger("corral.webhooks")

POLL_SECONDS, IDLE_SECONDS = 1.0, 10.0
RETRY_SECONDS = 2.0
OWN_EVENTS = "webhook."
ENTRY = UnitContext(label="webhooks.dispatch", actor=SYSTEM)


class _DueWork(NamedTuple):
    """A summary of due work: the events to look for, whether there are new ones, and the time of the next attempt."""

    patterns: frozenset[str]
    has_events: bool
    next_due_time: str | None


class WebhookDispatcher(EventDispatcher[ClaimedDelivery]):
    """Runs the delivery attempts of this process."""

    what = "webhooks"

    def __init__(
        self,
        work: Work,
        feed: Feed,
        runner: JobRunner,
        fan_out: WebhookFanOut,
        claims: DeliveryClaims,
        sender: WebhookSender,
        outcomes: DeliveryOutcomes,
        metrics: WebhookMetrics,
    ) -> None:
        super().__init__(work, feed, runner)
        self._fan_out, self._claims = fan_out, claims
        self._sender, self._outcomes, self._metrics = sender, outcomes, metrics
        self._patterns: frozenset[str] = frozenset()

    async def run_once(self) -> float:
        """Turn new events into deliveries, and start due attempts. Return the number of seconds until the next call."""
        outlook = await self._work(self._find_due_work, entry=ENTRY, read=True)
        self._patterns = outlook.patterns
        if outlook.has_events:
            await self._fan_out.handle_new_events()
        if outlook.has_events or (outlook.next_due_time is not None and outlook.next_due_time <= clock.now()):
            for claimed in await self._work(self._claims.claim, entry=ENTRY):
                self._start(claimed)
            return POLL_SECONDS
        if outlook.next_due_time is None:
            return POLL_SECONDS if outlook.patterns else IDLE_SECONDS
        return min(POLL_SECONDS, max(0.0, clock.parse_instant(outlook.next_due_time) - clock.time_s()))

    def _find_due_work(self) -> _DueWork:
        patterns = followed_patterns()
        return _DueWork(patterns, self._fan_out.has_events(patterns), self._claims.next_due_time())

    def _is_relevant(self, event: LoggedEvent) -> bool:
        return event.type.startswith(OWN_EVENTS) or not self._patterns.isdisjoint(matching_patterns(event.type))

    async def _attempt(self, claimed: ClaimedDelivery) -> None:
        """Attempt a delivery and record the result. If the attempt is interrupted, release the delivery."""
        at = clock.now()
        try:
            result = await self._send(claimed)
        except CircuitOpen as rejection:
            await self._release(claimed, rejection.retry_at)
        except (Problem, asyncio.CancelledError) as error:
            due = clock.now() if isinstance(error, asyncio.CancelledError) else clock.now(RETRY_SECONDS)
            await asyncio.shield(self._release(claimed, due))
            if isinstance(error, asyncio.CancelledError):
                raise
            log.warning("an event could not be delivered", extra={"webhook_id": claimed.webhook.id, "why": str(error)})
        else:
            self._metrics.count(result.error or "success")
            await asyncio.shield(self._record(claimed, result, at))

    async def _send(self, claimed: ClaimedDelivery) -> AttemptResult:
        """Send a delivery. An unexpected error counts as a failed attempt, so that retries eventually end."""
        delivery = claimed.delivery
        try:
            return await self._sender.send(
                claimed.webhook,
                message_id=delivery.id,
                payload=delivery.payload,
                timeout_seconds=claimed.timeout_seconds,
            )
        except Problem:
            raise
        except Exception as error:
            log.warning("a delivery failed unexpectedly", extra={"webhook_id": claimed.webhook.id}, exc_info=True)
            return AttemptResult(error="blocked", response=f"Not sent: {type(error).__name__} in Corral; see the log.")

    async def _record(self, claimed: ClaimedDelivery, result: AttemptResult, at: str) -> None:
        """Record a result. Retry while the database is unavailable."""
        while True:
            with contextlib.suppress(Unavailable):
                await self._work(lambda: self._outcomes.record(claimed, result, at), entry=ENTRY)
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _release(self, claimed: ClaimedDelivery, due_at: str) -> None:
        with contextlib.suppress(Unavailable):  # the lease ends by itself
            await self._work(lambda: self._claims.release(claimed, due_at), entry=ENTRY)


def hosts_of_webhooks() -> list[str]:
    """Return the hosts of active webhooks, at most 2,000. Runs in a unit of work."""
    rows = Webhook.select(Webhook.host).where(Webhook.is_active).distinct().limit(2000)
    return [str(row.host) for row in rows]
