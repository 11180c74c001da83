"""Delivers: in each process that runs jobs, reads new events, claims deliveries, and attempts them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Problem, Unavailable
from corral.events.live_feed import Feed, wait_and_clear
from corral.events.log import LoggedEvent
from corral.jobs.runner import JobRunner
from corral_plugins.circuit_breakers.api import CircuitOpen
from corral_plugins.webhooks.models import Webhook
from corral_plugins.webhooks.service.claims import Claimed, DeliveryClaims
from corral_plugins.webhooks.service.fan_out import WebhookFanOut, followed_patterns
from corral_plugins.webhooks.service.metrics import WebhookMetrics
from corral_plugins.webhooks.service.outcomes import DeliveryOutcomes
from corral_plugins.webhooks.service.payloads import matching_patterns
from corral_plugins.webhooks.service.sender import AttemptResult, WebhookSender

log = logging.getLogger("corral.webhooks")

POLL_SECONDS, IDLE_SECONDS = 1.0, 10.0
RETRY_SECONDS = 2.0
DRAIN_SECONDS = 20.0
OWN_EVENTS = "webhook."
ENTRY = UnitContext(label="webhooks.dispatch", actor=SYSTEM)


class _Outlook(NamedTuple):
    """What there is to do: the events that are followed, whether there are new ones, and when an attempt is due."""

    patterns: frozenset[str]
    has_events: bool
    next_time: str | None


class WebhookDispatcher:
    """Runs the attempts of this process."""

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
        self._work, self._feed, self._runner, self._fan_out, self._claims = work, feed, runner, fan_out, claims
        self._sender, self._outcomes, self._metrics = sender, outcomes, metrics
        self._wake_up = asyncio.Event()
        self._patterns: frozenset[str] = frozenset()
        self._running: dict[asyncio.Task[None], Claimed] = {}
        self._draining = False
        self._unwatch: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Follow the event feed."""
        self._unwatch = self._feed.watch(self._on_events)

    async def run(self) -> None:
        """Deliver until cancelled, in a process that runs jobs. The kernel runs this method in a supervised task."""
        await self._runner.started.wait()
        while not self._draining:
            try:
                seconds = await self.run_once()
            except Unavailable as problem:
                log.debug("webhooks are not dispatched", extra={"detail": problem.detail})
                seconds = POLL_SECONDS
            await wait_and_clear(self._wake_up, seconds)
        await asyncio.Event().wait()  # the process ends

    async def run_once(self) -> float:
        """Turn new events into deliveries, and start the attempts that are due. Return the seconds until the next."""
        outlook = await self._work(self._look, entry=ENTRY, read=True)
        self._patterns = outlook.patterns
        if outlook.has_events:
            await self._fan_out.read()
        if outlook.has_events or (outlook.next_time is not None and outlook.next_time <= clock.now()):
            for claimed in await self._work(self._claims.claim, entry=ENTRY):
                self._start(claimed)
            return POLL_SECONDS
        if outlook.next_time is None:
            return POLL_SECONDS if outlook.patterns else IDLE_SECONDS
        return min(POLL_SECONDS, max(0.0, clock.parse_instant(outlook.next_time) - clock.time_s()))

    @property
    def is_busy(self) -> bool:
        """Whether attempts are running."""
        return bool(self._running)

    async def finish(self) -> None:
        """Wait until the running attempts have ended."""
        while self._running:
            await asyncio.wait(self._running)

    async def drain(self) -> None:
        """Claim no more, and let the running attempts end."""
        self._draining = True
        self._wake_up.set()
        if self._running:
            await asyncio.wait(self._running, timeout=DRAIN_SECONDS)

    async def stop(self) -> None:
        """Break off the running attempts, and give back their deliveries."""
        self._draining = True
        self._unwatch()
        for task in [*self._running]:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    # -- parts

    def _look(self) -> _Outlook:
        patterns = followed_patterns()
        return _Outlook(patterns, self._fan_out.has_events(patterns), self._claims.next_time())

    def _on_events(self, events: Sequence[LoggedEvent]) -> None:
        """Wake up if a webhook follows one of the events, or if a webhook changed. Called by the event feed."""
        if any(self._is_followed(event.type) for event in events):
            self._wake_up.set()

    def _is_followed(self, name: str) -> bool:
        return name.startswith(OWN_EVENTS) or not self._patterns.isdisjoint(matching_patterns(name))

    def _start(self, claimed: Claimed) -> None:
        task = asyncio.get_running_loop().create_task(self._attempt(claimed))
        self._running[task] = claimed
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self._wake_up.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an attempt to deliver an event failed unexpectedly", exc_info=error)

    async def _attempt(self, claimed: Claimed) -> None:
        """Attempt a delivery and record the result. An attempt that is broken off gives the delivery back."""
        at, due = clock.now(), clock.now()
        try:
            result = await self._send(claimed)
        except CircuitOpen as rejection:
            due = rejection.retry_at
            await self._release(claimed, due)
        except (Problem, asyncio.CancelledError) as error:
            due = clock.now() if isinstance(error, asyncio.CancelledError) else clock.now(RETRY_SECONDS)
            await asyncio.shield(self._release(claimed, due))
            if isinstance(error, asyncio.CancelledError):
                raise
            log.warning("an event could not be delivered", extra={"webhook_id": claimed.webhook.id, "why": str(error)})
        else:
            self._metrics.count(result.error or "success")
            await asyncio.shield(self._record(claimed, result, at))

    async def _send(self, claimed: Claimed) -> AttemptResult:
        """Send a delivery. What fails unexpectedly is a failed attempt, or it would be tried again for ever."""
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

    async def _record(self, claimed: Claimed, result: AttemptResult, at: str) -> None:
        """Record a result, even if the database is unavailable for a moment."""
        while True:
            with contextlib.suppress(Unavailable):
                await self._work(lambda: self._outcomes.record(claimed, result, at), entry=ENTRY)
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _release(self, claimed: Claimed, due_at: str) -> None:
        with contextlib.suppress(Unavailable):  # the lease ends by itself
            await self._work(lambda: self._claims.release(claimed, due_at), entry=ENTRY)


def hosts_of_webhooks() -> list[str]:
    """Return the hosts of all active webhooks. Runs in a unit of work."""
    rows = Webhook.select(Webhook.host).where(Webhook.is_active).distinct().limit(2000)
    return [str(row.host) for row in rows]
