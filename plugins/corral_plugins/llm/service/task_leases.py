"""Checks and renews the leases of tasks that call models, and cancels a call when its task's lease ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Conflict
from corral_plugins.cost.api import BudgetScope, BudgetShortage, ChargedCost, TokenCounts
from corral_plugins.tasks.api import LeaseFacts, LeaseRef, LiveAttempt, Tasks

CHECK_SECONDS, RENEW_SECONDS = 0.5, 15.0


class CallLeases:
    """Tracks the leases of running calls.

    There is one instance per process; `watch_and_renew` must run as a supervised task.
    """

    tasks: Tasks | None

    def __init__(self, work: Work) -> None:
        self._work = work
        self._running: dict[asyncio.Timeout, LeaseRef] = {}
        self._wake = asyncio.Event()

    # -- called inside a unit of work

    def live_attempt(self, by: Principal) -> LiveAttempt | None:
        """Return the attempt to which the caller's lease belongs, or None if the caller has no live lease."""
        if self.tasks is None or by.lease_id is None or by.task_id is None:
            return None
        return self.tasks.live_attempt(by.task_id, by.lease_id)

    def renew(self, by: Principal) -> LiveAttempt | None:
        """Renew the caller's lease and return its attempt, or None if the caller has no live lease."""
        attempt = self.live_attempt(by)
        if attempt is not None and self.tasks is not None and by.task_id is not None and by.lease_id is not None:
            self.tasks.renew_lease(by.task_id, by.lease_id)
        return attempt

    def is_live(self, by: Principal) -> bool:
        """Renew the caller's lease and return whether it was still live. Return True if the caller has no lease."""
        return by.lease_id is None or by.task_id is None or self.renew(by) is not None

    def stop_run(self, by: Principal, *, kind: str) -> None:
        """Ask the worker to stop the run to which the caller's lease belongs.

        `kind` is the kind of cancellation, such as `budget`.
        """
        if self.tasks is not None and by.task_id is not None and by.lease_id is not None:
            self.tasks.stop_run(by.task_id, by.lease_id, kind=kind, reason=None)

    def record_shortage(self, by: Principal, scope: BudgetScope, shortage: BudgetShortage) -> None:
        """Record for the caller's task that a budget did not have enough money left for a call."""
        if self.tasks is not None and by.task_id is not None and by.lease_id is not None:
            self.tasks.record_shortage(
                by.task_id, by.lease_id, scope=scope, needed_micro=shortage.needed, left_micro=shortage.left
            )

    def lease_facts(self, by: Principal) -> LeaseFacts | None:
        """Return the facts about the caller's lease, even if it has ended, or None for callers without a lease."""
        if self.tasks is None or by.task_id is None or by.lease_id is None:
            return None
        return self.tasks.lease_facts(by.task_id, by.lease_id)

    def add_usage(self, by: Principal, tokens: TokenCounts, charged: ChargedCost) -> None:
        """Add the usage and cost of a call to the counters of the caller's task, unless they were already added."""
        if self.tasks is not None and by.task_id is not None and by.lease_id is not None and not charged.repeated:
            self.tasks.record_usage(
                by.task_id,
                by.lease_id,
                input_tokens=tokens.total - tokens.output_tokens,
                output_tokens=tokens.output_tokens,
                cost_usd=charged.cost_usd,
            )

    # -- called outside a unit of work

    @contextlib.asynccontextmanager
    async def cancel_when_lost(self, by: Principal) -> AsyncIterator[None]:
        """If the caller's lease ends or its task is being cancelled, cancel the `with` block and raise `Conflict`."""
        if by.task_id is None or by.lease_id is None:
            yield
            return
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._running[scope] = LeaseRef(by.task_id, by.lease_id)
                self._wake.set()
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise lease_lost_error() from None
        finally:
            self._running.pop(scope, None)

    async def watch_and_renew(self) -> None:
        """Check the leases of running calls twice a second, and renew them every 15 seconds."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while True:
            await self._wake.wait()
            await asyncio.sleep(CHECK_SECONDS)
            if not self._running:
                self._wake.clear()
                continue
            if loop.time() - renewed > RENEW_SECONDS:
                renewed = loop.time()
                await self._work(self._renew_leases)
            lost = await self._work(self._find_lost_leases, read=True)
            for scope, lease in list(self._running.items()):
                if lease.lease_id in lost and not scope.expired():
                    with contextlib.suppress(RuntimeError):  # raised if the call ended in the meantime
                        scope.reschedule(loop.time())

    def _find_lost_leases(self) -> set[str]:
        leases = list(self._running.values())
        if self.tasks is None:
            return {lease.lease_id for lease in leases}
        return {state.lease_id for state in self.tasks.lease_states(leases) if state.state != "ok"}

    def _renew_leases(self) -> None:
        if self.tasks is not None:
            for lease in sorted(self._running.values(), key=lambda each: each.lease_id):
                self.tasks.renew_lease(lease.task_id, lease.lease_id)


def lease_lost_error() -> Conflict:
    """Return the problem for a call whose lease has ended or whose task is being cancelled."""
    return Conflict("The lease has ended; stop the run and discard its results.", code="lease_lost")
