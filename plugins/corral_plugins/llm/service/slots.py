"""Concurrency slots of providers: leased rows shared by all processes, assigned in order of arrival.

A call enters its provider's queue in the unit of work that admits the call, and leaves the queue in the unit of work
that stores its outcome. Whenever a call enters or leaves the queue, free slots are assigned to the calls that have
waited longest, in any process. The row with the provider's state serves as the lock. The lock is acquired last in a
unit of work and held until the commit.
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
from corral.database.unit import after_commit, current, locked
from corral.errors import TooMany
from corral.ids import new_id
from corral_plugins.llm.models import HELD, IN_FLIGHT, WAITING, LlmCall, LlmProviderState, LlmSlot
from corral_plugins.llm.service.registry import Provider

HELD_SECONDS, WAITING_SECONDS = 45.0, 15.0
POLL_SECONDS, RENEW_SECONDS = 0.25, 5.0
UNLIMITED = 1_000_000
BATCH_ROWS = 500

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
_WAITING_LONGEST = Statement(
    lambda p: (
        LlmSlot.select(LlmSlot.id)
        .where((LlmSlot.provider == p("provider")) & (LlmSlot.state == WAITING) & (LlmSlot.until > p("now")))
        .order_by(LlmSlot.id)
        .limit(p("most"))
        .tuples()
    )
)
_ASSIGN = Statement(
    lambda p: LlmSlot.update({LlmSlot.state: HELD, LlmSlot.until: p("until")}).where(LlmSlot.id == p("id"))
)
_LOCK = Statement(
    lambda p: locked(LlmProviderState.select(LlmProviderState.name).where(LlmProviderState.name == p("provider")))
)


class ConcurrencySlot(msgspec.Struct, frozen=True):
    """The concurrency slot of a call. If `held` is false, the call must wait until the slot is assigned."""

    id: str
    provider: Provider
    held: bool


class ConcurrencySlots:
    """Manages the concurrency slots of this process.

    There is one instance per process; `renew_and_detect_assigned` must run as a supervised task.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.holder = f"{socket.gethostname()[:40]}:{os.getpid()}:{new_id()[-8:]}"
        self._waiting: dict[str, tuple[ConcurrencySlot, asyncio.Future[None]]] = {}
        self._wake = asyncio.Event()
        self._known_providers: set[str] = set()
        self._own: set[str] = set()

    # -- called inside a unit of work, as its last step

    def enter_queue(self, call_id: str, provider: Provider) -> ConcurrencySlot | None:
        """Add a call to the provider's queue and return its slot, or None if the provider has no concurrency limit."""
        if provider.concurrency is None and provider.fields.requests_per_minute is None:
            return None
        self._lock_provider(provider.name)
        slot_id = new_id()
        _ENTER.run(
            {
                "id": slot_id,
                "call": call_id,
                "provider": provider.name,
                "holder": self.holder,
                "until": clock.now(WAITING_SECONDS),
            }
        )
        after_commit(functools.partial(self._own.add, slot_id))
        return ConcurrencySlot(slot_id, provider, held=slot_id in self._assign_slots(provider))

    def leave_queue(self, slot: ConcurrencySlot | None) -> None:
        """Release the slot of a call. If no slot has been assigned to the call yet, remove the call from the queue."""
        if slot is not None:
            self._lock_provider(slot.provider.name)
            if _LEAVE.run({"id": slot.id}):
                self._assign_slots(slot.provider)
            after_commit(functools.partial(self._own.discard, slot.id))

    def _assign_slots(self, provider: Provider) -> list[str]:
        """Assign free slots to the calls that have waited longest. Return the ids of the assigned slots."""
        per_minute, most = provider.fields.requests_per_minute, provider.concurrency or UNLIMITED
        values = {"provider": provider.name, "now": clock.now()}
        waiting = _WAITING_LONGEST.rows({**values, "most": min(most, per_minute or UNLIMITED)})
        if not waiting:  # as a rule, when a call leaves
            return []
        free = most - len(_HELD.rows(values))
        if per_minute is not None:
            free = min(free, per_minute - _calls_this_minute(provider.name))
        slot_ids = [row[0] for row in waiting[: max(0, free)]]
        for slot_id in slot_ids:  # usually a single slot
            _ASSIGN.run({"id": slot_id, "until": clock.now(HELD_SECONDS)})
        if slot_ids:
            if per_minute is not None:
                _increment_calls_this_minute(provider.name, len(slot_ids))
            after_commit(functools.partial(self._wake_calls, slot_ids))
        return slot_ids

    def _lock_provider(self, name: str) -> None:
        if name not in self._known_providers:
            LlmProviderState.insert(name=name).on_conflict_ignore().execute()
            after_commit(functools.partial(self._known_providers.add, name))
        if not current().database.is_file:  # SQLite has one writer, so no row needs a lock
            _LOCK.rows({"provider": name})

    # -- called outside a unit of work

    async def wait_for_slot(self, slot: ConcurrencySlot | None, seconds: float) -> None:
        """Wait until the slot is assigned. Raise a `Problem` with the code `concurrency_limit` after `seconds`."""
        if slot is None or slot.held:
            return
        assigned = asyncio.get_running_loop().create_future()
        self._waiting[slot.id] = (slot, assigned)
        self._wake.set()
        try:
            async with asyncio.timeout(seconds):
                await assigned
        except TimeoutError:
            raise TooMany(
                f"{slot.provider.name} is busy: no concurrency slot became free within {seconds:g} seconds.",
                retry_after=5,
                code="concurrency_limit",
                provider=slot.provider.name,
            ) from None
        finally:
            self._waiting.pop(slot.id, None)

    def waiting_calls(self) -> dict[tuple[str, ...], float]:
        """Return the number of waiting calls of this process, by provider."""
        counts: dict[tuple[str, ...], float] = {}
        for slot, _ in list(self._waiting.values()):
            counts[(slot.provider.name,)] = counts.get((slot.provider.name,), 0) + 1
        return counts

    async def renew_and_detect_assigned(self) -> None:
        """Renew the slots of this process, and detect newly assigned slots.

        Other processes may assign slots to calls of this process.
        """
        renewed = 0.0
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS if self._waiting else RENEW_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            if self._own and loop.time() - renewed > (1.0 if self._waiting else RENEW_SECONDS):
                renewed = loop.time()
                await self._work(
                    self._renew_slots
                )  # two units of work, so that no row stays locked while waiting for a lock
                await self._work(self._assign_waiting)
            if self._waiting:
                self._wake_calls(await self._work(self._find_assigned, read=True))
                await asyncio.sleep(0.01)  # handles wake-ups in quick succession together

    def _renew_slots(self) -> None:
        in_flight = LlmCall.select(LlmCall.id).where(LlmCall.status == IN_FLIGHT)
        for state, seconds in ((HELD, HELD_SECONDS), (WAITING, WAITING_SECONDS)):
            own = (LlmSlot.holder == self.holder) & (LlmSlot.state == state) & LlmSlot.call_id.in_(in_flight)
            LlmSlot.update(until=clock.now(seconds)).where(own).execute()

    def _assign_waiting(self) -> None:
        """Assign free slots of the providers for which calls of this process are waiting.

        When a process dies, it cannot pass its slots on to the next calls in the queue. After these slots expire, other
        processes must assign them.
        """
        providers = {slot.provider.name: slot.provider for slot, _ in list(self._waiting.values())}
        for name in sorted(providers):
            self._lock_provider(name)
            self._assign_slots(providers[name])

    def _find_assigned(self) -> list[str]:
        own = (LlmSlot.holder == self.holder) & (LlmSlot.state == HELD)
        return [row.id for row in LlmSlot.select(LlmSlot.id).where(own)]

    def _wake_calls(self, slot_ids: list[str]) -> None:
        for slot_id in slot_ids:
            _, assigned = self._waiting.get(slot_id, (None, None))
            if assigned is not None and not assigned.done():
                assigned.set_result(None)


def _current_minute() -> int:
    return int(clock.time_s() // 60)


def _calls_this_minute(name: str) -> int:
    row = LlmProviderState.get_by_id(name)
    return int(row.calls_in_minute) if row.minute == _current_minute() else 0


def _increment_calls_this_minute(name: str, n: int) -> None:
    state, minute = LlmProviderState, _current_minute()
    own = state.name == name
    if not state.update(calls_in_minute=state.calls_in_minute + n).where(own & (state.minute == minute)).execute():
        state.update(minute=minute, calls_in_minute=n).where(own).execute()


def delete_expired() -> int:
    """Delete at most 500 slots that are no longer renewed by any process, and return their number."""
    expired = LlmSlot.select(LlmSlot.id).where(LlmSlot.until < clock.now(-60)).limit(BATCH_ROWS)
    return int(LlmSlot.delete().where(LlmSlot.id.in_(expired)).execute())
