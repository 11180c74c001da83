"""Places with providers over all processes: leased rows, first come, first served (docs/adr).

A call enters the queue of its provider in the unit that begins it and leaves in the one that settles it. Whoever enters
or leaves gives free places to those that have waited longest, wherever they wait; who waits looks whether it got one.
The row of the provider's state is the lock, taken last in a unit and held until its commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.statement import Statement
from corral.database.unit import after_commit, locked
from corral.errors import TooMany
from corral.ids import new_id
from corral_plugins.llm.models import HELD, IN_FLIGHT, WAITING, LlmCall, LlmProviderState, LlmSlot
from corral_plugins.llm.service.provider import Provider

HELD_SECONDS, WAITING_SECONDS = 45.0, 15.0
LOOK_EVERY, RENEW_EVERY = 0.25, 5.0
ANY_NUMBER = 1_000_000
SWEEP_AT_ONCE = 500

_ENTER = Statement(
    lambda p: LlmSlot.insert(
        {
            LlmSlot.id: p("id"),
            LlmSlot.call_id: p("call"),
            LlmSlot.provider: p("provider"),
            LlmSlot.holder: p("holder"),
            LlmSlot.state: WAITING,
            LlmSlot.until: p("until"),
        }
    )
)
_LEAVE = Statement(lambda p: LlmSlot.delete().where(LlmSlot.id == p("id")))
_HELD = Statement(
    lambda p: (
        LlmSlot.select(LlmSlot.id)
        .where((LlmSlot.provider == p("provider")) & (LlmSlot.state == HELD) & (LlmSlot.until > p("now")))
        .tuples()
    )
)
_LONGEST = Statement(
    lambda p: (
        LlmSlot.select(LlmSlot.id)
        .where((LlmSlot.provider == p("provider")) & (LlmSlot.state == WAITING) & (LlmSlot.until > p("now")))
        .order_by(LlmSlot.id)
        .limit(p("free"))
        .tuples()
    )
)
_GIVE = Statement(
    lambda p: LlmSlot.update({LlmSlot.state: HELD, LlmSlot.until: p("until")}).where(LlmSlot.id == p("id"))
)


class Ticket(msgspec.Struct, frozen=True):
    """A place in a provider's queue; `held`: it got in at once."""

    id: str
    provider: Provider
    held: bool


class Slots:
    """One a process. `run` must be supervised while it is used."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.holder = f"{socket.gethostname()[:40]}:{os.getpid()}:{new_id()[-8:]}"
        self._waiting: dict[str, tuple[Ticket, asyncio.Future[None]]] = {}
        self._bell = asyncio.Event()
        self._known: set[str] = set()
        self._mine: set[str] = set()

    # -- inside a unit, as the last thing it does

    def enter(self, call_id: str, provider: Provider) -> Ticket | None:
        """Take a place, or a number in the queue; None: this provider has no limit."""
        if provider.concurrency is None and provider.requests_per_minute is None:
            return None
        self._lock(provider.name)
        ticket_id = new_id()
        _ENTER.run(
            {
                "id": ticket_id,
                "call": call_id,
                "provider": provider.name,
                "holder": self.holder,
                "until": clock.now(WAITING_SECONDS),
            }
        )
        after_commit(functools.partial(self._mine.add, ticket_id))
        return Ticket(ticket_id, provider, held=ticket_id in self._give(provider))

    def leave(self, ticket: Ticket | None) -> None:
        """Give the place back; who has waited longest gets it."""
        if ticket is not None:
            self._lock(ticket.provider.name)
            if _LEAVE.run({"id": ticket.id}):
                self._give(ticket.provider)
            after_commit(functools.partial(self._mine.discard, ticket.id))

    def _give(self, provider: Provider) -> list[str]:
        """Give what is free; the tickets that got a place."""
        now = clock.now()
        held = len(_HELD.rows({"provider": provider.name, "now": now}))
        free = (provider.concurrency or ANY_NUMBER) - held
        if provider.requests_per_minute is not None:
            free = min(free, _left_of_minute(provider.name, provider.requests_per_minute))
        if free <= 0:
            return []
        given = [row[0] for row in _LONGEST.rows({"provider": provider.name, "now": now, "free": free})]
        for ticket_id in given:  # mostly one
            _GIVE.run({"id": ticket_id, "until": clock.now(HELD_SECONDS)})
        if given and provider.requests_per_minute is not None:
            _count_minute(provider.name, len(given))
        if given:
            after_commit(functools.partial(self._tell, given))
        return given

    def _lock(self, name: str) -> None:
        if name not in self._known:
            LlmProviderState.insert(name=name).on_conflict_ignore().execute()
            after_commit(functools.partial(self._known.add, name))
        locked(LlmProviderState.select(LlmProviderState.name).where(LlmProviderState.name == name)).execute()

    # -- outside

    async def wait(self, ticket: Ticket | None, seconds: float) -> None:
        """Return when the ticket's place is free; `concurrency_limit` when that takes too long."""
        if ticket is None or ticket.held:
            return
        got = asyncio.get_running_loop().create_future()
        self._waiting[ticket.id] = (ticket, got)
        self._bell.set()
        try:
            async with asyncio.timeout(seconds):
                await got
        except TimeoutError:
            raise TooMany(
                f"{ticket.provider.name} is busy: no place became free within {seconds:g} seconds.",
                retry_after=5,
                code="concurrency_limit",
                provider=ticket.provider.name,
            ) from None
        finally:
            self._waiting.pop(ticket.id, None)

    def waiting(self) -> dict[tuple[str, ...], float]:
        """Calls of this process that wait, by provider."""
        counts: dict[tuple[str, ...], float] = {}
        for ticket, _ in list(self._waiting.values()):
            counts[(ticket.provider.name,)] = counts.get((ticket.provider.name,), 0) + 1
        return counts

    async def run(self) -> None:
        """Keep this process's places alive, and look for what others gave to it."""
        renewed = 0.0
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY if self._waiting else RENEW_EVERY):
                    await self._bell.wait()
            self._bell.clear()
            if self._mine and loop.time() - renewed > (1.0 if self._waiting else RENEW_EVERY):
                renewed = loop.time()
                await self._work(self._renew)  # two units: a row is never held while a lock is waited for
                await self._work(self._give_here)
            if self._waiting:
                self._tell(await self._work(self._granted, read=True))
                await asyncio.sleep(0.01)  # rings that follow each other closely are answered together

    def _renew(self) -> None:
        """Places of own calls live on."""
        running = LlmCall.select(LlmCall.id).where(LlmCall.status == IN_FLIGHT)
        for state, seconds in ((HELD, HELD_SECONDS), (WAITING, WAITING_SECONDS)):
            mine = (LlmSlot.holder == self.holder) & (LlmSlot.state == state) & LlmSlot.call_id.in_(running)
            LlmSlot.update(until=clock.now(seconds)).where(mine).execute()

    def _give_here(self) -> None:
        """Free places, also of processes that died, are given to who waits here."""
        providers = {ticket.provider.name: ticket.provider for ticket, _ in list(self._waiting.values())}
        for name in sorted(providers):
            self._lock(name)
            self._give(providers[name])

    def _granted(self) -> list[str]:
        mine = (LlmSlot.holder == self.holder) & (LlmSlot.state == HELD)
        return [row.id for row in LlmSlot.select(LlmSlot.id).where(mine)]

    def _tell(self, ticket_ids: list[str]) -> None:
        for ticket_id in ticket_ids:
            found = self._waiting.get(ticket_id)
            if found is not None and not found[1].done():
                found[1].set_result(None)


def _left_of_minute(name: str, limit: int) -> int:
    row = LlmProviderState.get_by_id(name)
    return limit - (row.calls_in_minute if row.minute == _minute() else 0)


def _count_minute(name: str, n: int) -> None:
    state, minute = LlmProviderState, _minute()
    mine = state.name == name
    if not state.update(calls_in_minute=state.calls_in_minute + n).where(mine & (state.minute == minute)).execute():
        state.update(minute=minute, calls_in_minute=n).where(mine).execute()


def _minute() -> int:
    return int(clock.time_s() // 60)


def sweep() -> int:
    """Delete places that nobody keeps alive any more; at most 500 a time."""
    dead = LlmSlot.select(LlmSlot.id).where(LlmSlot.until < clock.now(-60)).limit(SWEEP_AT_ONCE)
    return int(LlmSlot.delete().where(LlmSlot.id.in_(dead)).execute())
