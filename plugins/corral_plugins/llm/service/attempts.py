"""One call against its models: a place in the queue, retries with the same provider, then the next model."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from corral.database.engine import Work
from corral.plugin import Settings
from corral.redact.redactor import Redactor
from corral_plugins.admin.api import KillSwitch
from corral_plugins.llm.api import ProviderError
from corral_plugins.llm.service.failures import is_about_credentials, may_fall_back, may_try_again, problem_of
from corral_plugins.llm.service.outcome import Outcome
from corral_plugins.llm.service.plan import Plan
from corral_plugins.llm.service.registry import Target
from corral_plugins.llm.service.seen import Seen
from corral_plugins.llm.service.slots import Slots, Ticket
from corral_plugins.llm.service.states import States
from corral_plugins.llm.settings import QUEUE_TIMEOUT_SECONDS

log = logging.getLogger("corral.llm")
T = TypeVar("T")

LONGEST_WAIT = 10.0
JITTER = 0.25


class Attempts:
    """Runs the calls of plans. Every failure that it raises is a `ProviderError` or a problem."""

    switch: KillSwitch | None

    def __init__(
        self, work: Work, settings: Settings, redactor: Redactor, slots: Slots, states: States, seen: Seen
    ) -> None:
        self._work, self._settings, self._redactor = work, settings, redactor
        self._slots, self._states, self._seen = slots, states, seen

    async def run(self, plan: Plan, outcome: Outcome, call: Callable[[Target], Awaitable[T]]) -> T:
        """What the first model answers that can. `plan.ticket` is the place that is held when this returns or raises.

        Nothing falls back once `call` has returned.
        """
        for place, target in enumerate(plan.targets):
            if place:
                await self._move(plan, target)
            outcome.target, outcome.reached, outcome.told = target, False, None
            await self._wait(plan)
            if place or (plan.ticket is not None and not plan.ticket.held):
                await self._check_switch()
            try:
                return await self._insist(plan, target, outcome, call)
            except ProviderError as failure:
                if place == len(plan.targets) - 1 or not may_fall_back(failure):
                    raise
                self._seen.fell_back(target.provider.name)
                log.info("falling back", extra={"model": target.name, "status": failure.status})
                await self._note(plan, target, failure)
        raise AssertionError("a plan has at least one target")

    async def _wait(self, plan: Plan) -> None:
        await self._slots.wait(plan.ticket, self._settings.get(QUEUE_TIMEOUT_SECONDS))

    async def _note(self, plan: Plan, target: Target, failure: ProviderError) -> None:
        """A provider that fails is not forgotten because another one serves."""
        name = target.provider.name
        problem = problem_of(failure, name, self._redactor)
        error, refused = {"code": problem.code, "detail": problem.detail}, is_about_credentials(problem)
        await self._work(lambda: self._states.note_failure(name, error, credentials_refused=refused), entry=plan.entry)

    async def _insist(self, plan: Plan, target: Target, outcome: Outcome, call: Callable[[Target], Awaitable[T]]) -> T:
        """Ask the same provider again while that may help; each time counts for its requests a minute."""
        tries = 0
        while True:
            outcome.attempts += 1
            try:
                outcome.reached = True
                return await call(target)
            except ProviderError as failure:
                outcome.note_refusal(failure)
                wait = delay(tries, failure)
                if tries >= target.provider.max_retries or not may_try_again(failure) or wait is None:
                    raise
                log.info("asking again", extra={"model": target.name, "status": failure.status, "seconds": wait})
            tries += 1
            await asyncio.sleep(wait)
            if target.provider.requests_per_minute is not None:
                await self._move(plan, target)
                await self._wait(plan)
            await self._check_switch()

    async def _check_switch(self) -> None:
        """Nothing is sent that was admitted before the kill switch was engaged."""
        if self.switch is not None:
            await self._work(self.switch.refuse_if_engaged, read=True)

    async def _move(self, plan: Plan, target: Target) -> None:
        """Leave one queue and enter another, in two units: nobody holds two locks."""
        left: Ticket | None = plan.ticket
        if left is not None:
            await self._work(lambda: self._slots.leave(left), entry=plan.entry)
        unit = self._work(lambda: self._slots.enter(plan.call_id, target.provider), entry=plan.entry)
        entering = asyncio.ensure_future(unit)
        try:
            plan.ticket = await asyncio.shield(entering)
        except asyncio.CancelledError:
            plan.ticket = await entering  # who entered must leave
            raise


def delay(tries: int, failure: ProviderError) -> float | None:
    """Seconds before the next try: 1, 2, 4 with jitter, or what the provider asks for; None: it asks for too much."""
    asked = float(failure.retry_after or 0)
    if asked > LONGEST_WAIT:
        return None
    wait = float(2**tries) * (1 + random.uniform(-JITTER, JITTER))  # noqa: S311  (no secret)
    return max(asked, wait)
