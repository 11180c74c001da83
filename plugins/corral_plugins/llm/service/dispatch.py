"""Sends a model call to a provider: waits for a concurrency slot, retries, and falls back to the next model."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from corral.database.engine import Work
from corral.plugin import Settings
from corral.redact.redactor import Redactor
from corral_plugins.admin.api import KillSwitch
from corral_plugins.cost.api import BudgetRefused
from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.service.call_budgets import CallBudgets
from corral_plugins.llm.service.calls import CallOutcome, CallRecord
from corral_plugins.llm.service.metrics import CallMetrics
from corral_plugins.llm.service.registry import ModelTarget
from corral_plugins.llm.service.responses import allows_fallback, is_about_credentials, is_retryable, problem_of
from corral_plugins.llm.service.settlement import ProviderStates
from corral_plugins.llm.service.slots import ConcurrencySlots
from corral_plugins.llm.settings import QUEUE_TIMEOUT_SECONDS

log = logging.getLogger("corral.llm")
T = TypeVar("T")

MAX_RETRY_AFTER = 10.0
JITTER = 0.25
CIRCUIT_OPEN = "circuit_open"


class CallDispatcher:
    """Sends calls to providers. Raises only `ProviderError` and `Problem`."""

    switch: KillSwitch | None

    def __init__(
        self,
        work: Work,
        settings: Settings,
        redactor: Redactor,
        slots: ConcurrencySlots,
        states: ProviderStates,
        budgets: CallBudgets,
        metrics: CallMetrics,
    ) -> None:
        self._work, self._settings, self._redactor = work, settings, redactor
        self._slots, self._states, self._budgets, self._metrics = slots, states, budgets, metrics

    async def send_call(self, call: CallRecord, outcome: CallOutcome, send: Callable[[ModelTarget], Awaitable[T]]) -> T:
        """Pass the targets of a model call to `send`, one after another, until one succeeds, and return its result.

        No other target is tried after a success, or after an error that does not allow a fallback. When this method
        returns or raises, `call.slot` is the concurrency slot that the model call still holds.
        """
        last = call.targets[-1]
        for n, target in enumerate(call.targets):
            if n:
                await self._change_queue(call, target)
                await self._change_hold(call, target)
            outcome.begin_target(target)
            await self._wait_for_slot(call)
            if n or (call.slot is not None and not call.slot.held):
                await self._check_kill_switch()
            try:
                return await self._send_with_retries(call, target, outcome, send)
            except ProviderError as error:
                if target is last or not allows_fallback(error):
                    raise
                self._metrics.add_fallback(target.provider.name)
                log.info("falling back to the next model", extra={"model": target.name, "status": error.status})
                if error.code != CIRCUIT_OPEN:
                    await self._record_error(call, target, error)
        raise AssertionError("the call has no target")

    async def _wait_for_slot(self, call: CallRecord) -> None:
        await self._slots.wait_for_slot(call.slot, self._settings.get(QUEUE_TIMEOUT_SECONDS))

    async def _record_error(self, call: CallRecord, target: ModelTarget, error: ProviderError) -> None:
        name = target.provider.name
        problem = problem_of(error, name, self._redactor)
        summary, refused = {"code": problem.code, "detail": problem.detail}, is_about_credentials(problem)
        await self._work(
            lambda: self._states.record_error(name, summary, credentials_refused=refused), entry=call.entry
        )

    async def _send_with_retries(
        self, call: CallRecord, target: ModelTarget, outcome: CallOutcome, send: Callable[[ModelTarget], Awaitable[T]]
    ) -> T:
        """Send the request, and retry with the same provider while a retry could succeed.

        Every attempt counts towards the provider's limit on requests per minute.
        """
        fields = target.provider.fields
        retries = 0
        while True:
            outcome.attempts += 1
            try:
                outcome.billable = True
                return await send(target)
            except ProviderError as error:
                outcome.add_provider_error(error)
                if error.code == CIRCUIT_OPEN:  # no request was sent
                    outcome.attempts -= 1
                seconds = retry_delay(retries, error)
                if retries >= fields.max_retries or not is_retryable(error) or seconds is None:
                    raise
                extra = {"model": target.name, "status": error.status, "seconds": seconds}
                log.info("retrying the provider", extra=extra)
            retries += 1
            await asyncio.sleep(seconds)
            if fields.requests_per_minute is not None:
                await self._change_queue(call, target)
                await self._wait_for_slot(call)
            await self._check_kill_switch()

    async def _check_kill_switch(self) -> None:
        """Raise `Problem` if the kill switch was engaged after the call was admitted."""
        if self.switch is not None:
            await self._work(self.switch.refuse_if_engaged, read=True)

    async def _change_queue(self, call: CallRecord, target: ModelTarget) -> None:
        """Leave the queue of the previous provider and enter the queue of the target's provider.

        Each of the two steps has its own unit of work, so that no unit of work holds two locks.
        """
        if call.slot is not None:
            await self._work(lambda: self._slots.leave_queue(call.slot), entry=call.entry)
        unit = self._work(lambda: self._slots.enter_queue(call.id, target.provider), entry=call.entry)
        entering = asyncio.ensure_future(unit)
        try:
            call.slot = await asyncio.shield(entering)
        except asyncio.CancelledError:
            call.slot = await entering  # settlement must be able to leave the queue
            raise

    async def _change_hold(self, call: CallRecord, target: ModelTarget) -> None:
        """Replace the call's reservation with a reservation for the cost of calling a fallback target.

        Raise `BudgetRefused` if a budget does not allow the new reservation. The old one is released first, in its own
        unit of work.
        """
        if call.hold is not None:
            await self._work(lambda: self._budgets.release(call), entry=call.entry)
            call.hold = None
        try:
            call.hold = await self._work(lambda: self._budgets.hold_cost_of_fallback(call, target), entry=call.entry)
        except BudgetRefused as refused:
            if call.by.lease_id is not None:
                await self._work(functools.partial(self._budgets.report_refusal, call.by, refused), entry=call.entry)
            raise


def retry_delay(retries: int, error: ProviderError) -> float | None:
    """Return the number of seconds to wait before a retry: 1, 2, 4 and so on, with jitter.

    If the provider asks for a longer wait, return the requested number of seconds instead, or None if it exceeds
    `MAX_RETRY_AFTER`.
    """
    requested = float(error.retry_after or 0)
    if requested > MAX_RETRY_AFTER:
        return None
    backoff = float(2**retries) * (1 + random.uniform(-JITTER, JITTER))  # noqa: S311  (not used for security)
    return max(requested, backoff)
