"""Leases under which calls run: looked at twice a second, so that a call ends with its lease, and kept alive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral_plugins.llm.service.failures import lease_lost
from corral_plugins.tasks.api import LeaseRef, Tasks

LOOK_EVERY, RENEW_EVERY = 0.5, 15.0


class LeaseWatch:
    """One a process. `run` must be supervised while it is used."""

    tasks: Tasks | None

    def __init__(self, work: Work) -> None:
        self._work = work
        self._watched: dict[asyncio.Timeout, LeaseRef] = {}
        self._begun = asyncio.Event()

    @contextlib.asynccontextmanager
    async def over(self, by: Principal) -> AsyncIterator[None]:
        """End the body with `lease_lost` soon after the caller's lease ends or its task is to be cancelled."""
        if by.task_id is None or by.lease_id is None:
            yield
            return
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._watched[scope] = LeaseRef(by.task_id, by.lease_id)
                self._begun.set()
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise lease_lost() from None
        finally:
            self._watched.pop(scope, None)

    async def run(self) -> None:
        """Look at the leases of running calls, for ever."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while True:
            await self._begun.wait()
            await asyncio.sleep(LOOK_EVERY)
            if not self._watched:
                self._begun.clear()
                continue
            if loop.time() - renewed > RENEW_EVERY:
                renewed = loop.time()
                await self._work(self._renew)
            gone = await self._work(self._gone, read=True)
            for scope, lease in list(self._watched.items()):
                if lease.lease_id in gone and not scope.expired():
                    with contextlib.suppress(RuntimeError):  # it ended in this moment
                        scope.reschedule(loop.time())

    def _gone(self) -> set[str]:
        leases = list(self._watched.values())
        if self.tasks is None:
            return {lease.lease_id for lease in leases}
        return {state.lease_id for state in self.tasks.lease_states(leases) if state.state != "ok"}

    def _renew(self) -> None:
        if self.tasks is not None:
            for lease in sorted(self._watched.values(), key=lambda each: each.lease_id):
                self.tasks.renew_one(lease.task_id, lease.lease_id)
