"""Sends notifications. Each process that runs jobs reads new events, claims deliveries, and attempts them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Problem, Unavailable
from corral.events.live_feed import Feed
from corral.events.log import LoggedEvent
from corral.jobs.runner import JobRunner
from corral_core.event_log.api import EventDispatcher
from corral_plugins.circuit_breakers.api import CircuitOpen
from corral_plugins.notifications.api import SendResult
from corral_plugins.notifications.service.claims import ClaimedDelivery, DeliveryClaims
from corral_plugins.notifications.service.fan_out import CAUSE, NotificationFanOut
from corral_plugins.notifications.service.metrics import NotificationMetrics
from corral_plugins.notifications.service.outcomes import DeliveryOutcomes
from corral_plugins.notifications.service.outgoing_messages import OutgoingMessages
from corral_plugins.notifications.service.sender import ChannelSender

log = logging.getLogger("corral.notifications")

POLL_SECONDS, IDLE_SECONDS, RETRY_SECONDS = 1.0, 10.0, 2.0
LOOK_SECONDS, LOOKS_A_RENEWAL = 1.0, 15  # a lease survives three renewals that fail
UNRECORDED = "The attempt failed, and its error could not be stored; see the log."
ENTRY = UnitContext(label="notifications.dispatch", actor=SYSTEM, cause=(CAUSE,))


class _DueWork(msgspec.Struct, frozen=True):
    """The names of the events that cause notifications, and the time when the next delivery is due."""

    names: frozenset[str]
    next_due_time: str | None


class NotificationDispatcher(EventDispatcher[ClaimedDelivery]):
    """Runs the delivery attempts of this process."""

    what = "notifications"

    def __init__(
        self,
        work: Work,
        feed: Feed,
        runner: JobRunner,
        fan_out: NotificationFanOut,
        claims: DeliveryClaims,
        sender: ChannelSender,
        outcomes: DeliveryOutcomes,
        messages: OutgoingMessages,
        metrics: NotificationMetrics,
    ) -> None:
        super().__init__(work, feed, runner)
        self._fan_out, self._claims = fan_out, claims
        self._sender, self._outcomes, self._messages, self._metrics = sender, outcomes, messages, metrics
        self._names: frozenset[str] = frozenset()

    async def run_once(self) -> float:
        """Write the messages about new events, and start due attempts.

        Return the number of seconds until the next attempt.
        """
        await self._fan_out.handle_new_events()
        outlook = await self._work(self._find_due_work, entry=ENTRY, read=True)
        self._names = outlook.names
        if outlook.next_due_time is None:
            return IDLE_SECONDS
        if outlook.next_due_time > clock.now():
            return min(IDLE_SECONDS, max(0.0, clock.parse_instant(outlook.next_due_time) - clock.time_s()))
        found = await self._work(self._claims.claim, entry=ENTRY)
        for claimed in found.claimed:
            self._start(claimed)
        return 0.0 if found.more else POLL_SECONDS

    def _find_due_work(self) -> _DueWork:
        return _DueWork(self._fan_out.followed_names(), self._claims.next_due_time())

    def _is_relevant(self, event: LoggedEvent) -> bool:
        return event.type in self._names

    async def _attempt(self, claimed: ClaimedDelivery) -> None:
        """Attempt a delivery and record the result. If the attempt is interrupted, release the delivery."""
        try:
            result = await self._send(claimed)
        except CircuitOpen as rejection:
            await self._release(claimed, rejection.retry_at)
        except (Problem, asyncio.CancelledError) as error:
            due = clock.now() if isinstance(error, asyncio.CancelledError) else clock.now(RETRY_SECONDS)
            await asyncio.shield(self._release(claimed, due))
            if isinstance(error, asyncio.CancelledError):
                raise
            log.warning("a notification could not be sent", extra={"channel": claimed.channel.id, "why": str(error)})
        else:
            self._metrics.count(claimed.kind.type, "success" if result.error is None else "failure")
            await asyncio.shield(self._record(claimed, result))

    async def _send(self, claimed: ClaimedDelivery) -> SendResult:
        """Send a delivery, and renew its lease while sending. An unexpected error counts as a failed attempt."""
        renewal = asyncio.get_running_loop().create_task(self._renew(claimed))
        try:
            notification = self._messages.of_delivery(claimed.delivery, to=claimed.to)
            return await self._sender.send(claimed.channel, claimed.kind, notification)
        except Problem:
            raise
        except Exception as error:
            log.warning("a notification failed unexpectedly", extra={"channel": claimed.channel.id}, exc_info=True)
            return SendResult(error=f"{type(error).__name__} in Corral; see the log.", says_nothing=True)
        finally:
            renewal.cancel()

    async def _renew(self, claimed: ClaimedDelivery) -> None:
        """Renew the lease of an attempt, and store the addresses that already have the message.

        This limits the number of addresses that get the message twice after a crash.
        """
        served = claimed.delivery.served
        while True:
            before = len(served)
            for _ in range(LOOKS_A_RENEWAL):
                await asyncio.sleep(LOOK_SECONDS)
                if len(served) > before:
                    break
            with contextlib.suppress(Unavailable):
                await self._work(lambda: self._claims.renew(claimed), entry=ENTRY)

    async def _record(self, claimed: ClaimedDelivery, result: SendResult) -> None:
        """Record a result, and retry while the database is unavailable.

        A delivery whose result cannot be recorded would be attempted again and again. If recording fails for another
        reason, a fixed text is therefore recorded instead of the result.
        """
        told = result
        while True:
            try:
                await self._work(functools.partial(self._outcomes.record, claimed, told), entry=ENTRY)
                return
            except Unavailable:
                await asyncio.sleep(POLL_SECONDS)
            except Exception:
                if told is not result:
                    raise
                log.exception("a result could not be recorded", extra={"channel": claimed.channel.id})
                error = None if result.error is None else UNRECORDED
                told = SendResult(error=error, permanent=result.permanent, retry_after=result.retry_after)

    async def _release(self, claimed: ClaimedDelivery, due_at: str) -> None:
        with contextlib.suppress(Unavailable):  # the lease ends by itself
            await self._work(lambda: self._claims.release(claimed, due_at), entry=ENTRY)
