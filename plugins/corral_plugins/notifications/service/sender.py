"""Sends notifications through channels, guarded by circuit breakers. Nothing in this module runs in a unit of work."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

from corral.crypto import InvalidSealedValue
from corral.database.engine import Work
from corral.errors import Problem
from corral.redact.redactor import Redactor
from corral_plugins.circuit_breakers.api import Breakers, Verdict
from corral_plugins.notifications.api import ChannelType, OutgoingNotification, SendResult
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.channel_types import CHANNEL_BREAKER, MAIL_BREAKER, ChannelTypeRegistry
from corral_plugins.notifications.service.credentials import ChannelCredentials

log = logging.getLogger("corral.notifications")

UNREADABLE = "Not sent: the stored secrets of the channel cannot be decrypted; set them again."
ATTEMPT_SECONDS = 900.0  # no type of channel takes so long by itself: a mail to 50 addresses takes some minutes


class ChannelSender:
    """Sends notifications. If the channel's circuit breaker is open, raises `CircuitOpen` instead of sending."""

    breakers: Breakers | None

    def __init__(
        self, work: Work, types: ChannelTypeRegistry, credentials: ChannelCredentials, redactor: Redactor
    ) -> None:
        self._work, self._types, self._credentials, self._redactor = work, types, credentials, redactor

    def declare(self) -> None:
        """Declare the circuit breakers that guard channels."""
        if self.breakers is not None:
            self.breakers.declare(CHANNEL_BREAKER, _breaker_names)
            self.breakers.declare(MAIL_BREAKER, lambda: [MAIL_BREAKER])

    async def send(self, row: Channel, kind: ChannelType, notification: OutgoingNotification) -> SendResult:
        """Send a notification, and return the result of the attempt."""
        try:
            config = self._credentials.config(row)
        except InvalidSealedValue:  # counts as a failure, or it would be tried again for ever
            return SendResult(error=UNREADABLE, says_nothing=True)
        call = functools.partial(self._attempt, kind, config, notification)
        if self.breakers is None:
            return await call()
        return await self.breakers.guard(self._types.breaker_of(row), call, judge=_judge)

    async def _attempt(
        self, kind: ChannelType, config: dict[str, Any], notification: OutgoingNotification
    ) -> SendResult:
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                return await kind.send(config, notification)
        except Problem:
            raise
        except TimeoutError:
            return SendResult(error=f"timeout: the channel did not finish within {ATTEMPT_SECONDS:g} s")
        except Exception as error:
            log.warning("a channel failed unexpectedly", extra={"type": kind.type}, exc_info=True)
            return SendResult(error=self._redactor.redact(f"{type(error).__name__}: {error}")[:300])


def _breaker_names() -> list[str]:
    """Return the names of the channels' circuit breakers. Runs in a unit of work."""
    return [f"{CHANNEL_BREAKER}:{row.id}" for row in Channel.select(Channel.id).where(Channel.is_enabled).limit(2000)]


def _judge(outcome: Any) -> Verdict:
    """Classify the outcome of an attempt for the circuit breaker."""
    if isinstance(outcome, SendResult):
        return "success" if outcome.error is None else "neutral" if outcome.says_nothing else "failure"
    return "neutral" if isinstance(outcome, Problem) else "failure"
