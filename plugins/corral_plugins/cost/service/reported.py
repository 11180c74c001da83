"""Events that come by HTTP: what a run spent outside the gateway, and what an admin corrects."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden, Invalid
from corral_plugins.cost.api import Charged, Spent
from corral_plugins.cost.service.ledger import Ledger
from corral_plugins.cost.shapes import EventView, NewEvent
from corral_plugins.tasks.api import LeaseFacts, Tasks


class Taken(msgspec.Struct, frozen=True):
    """An event that was reported. `is_late`: its lease has ended; the money was spent all the same."""

    event: EventView
    is_new: bool
    is_late: bool


class ReportedEvents:
    """Joins the caller's unit."""

    tasks: Tasks | None

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def take(self, new: NewEvent, lease_id: str | None, by: Principal) -> Taken:
        """Write an event for the attempt of a lease, or as an admin."""
        if lease_id is None:
            return self._from_admin(new, by)
        lease = self._lease(new, lease_id, by)
        refuse_negative(new)
        given = {
            "agent_id": lease.agent_id,
            "task_id": lease.task_id,
            "attempt_id": lease.attempt_id,
            "user_id": lease.requester_id,
        }
        charged = self._ledger.settle(_spent(new, **given))
        if not charged.repeated:
            self._tell(new, lease, charged)
        return Taken(self._ledger.one(charged.event_id), not charged.repeated, not lease.is_live)

    def _from_admin(self, new: NewEvent, by: Principal) -> Taken:
        if not by.may("cost.write"):
            raise Forbidden("Without a lease only admins may write cost events.")
        named = {name: getattr(new, name) for name in ("agent_id", "task_id", "user_id", "conversation_id", "run_id")}
        charged = self._ledger.settle(_spent(new, **{name: id and id.lower() for name, id in named.items()}))
        return Taken(self._ledger.one(charged.event_id), not charged.repeated, is_late=False)

    def _lease(self, new: NewEvent, lease_id: str, by: Principal) -> LeaseFacts:
        task_id = (new.task_id or by.task_id or "").lower()
        if not task_id:
            raise Invalid.at("/task_id", "required", "Say which task the lease is of.")
        lease = None if self.tasks is None else self.tasks.lease_facts(task_id, lease_id)
        if lease is None:
            raise Conflict("There is no such lease of this task.", code="lease_lost")
        if by.worker_id != lease.worker_id and by.lease_id != lease.lease_id:
            raise Forbidden("This lease is held by another worker.")
        return lease

    def _tell(self, new: NewEvent, lease: LeaseFacts, charged: Charged) -> None:
        """Add it to the task's own tally, which has one figure for all that was read."""
        assert self.tasks is not None
        self.tasks.spent(
            lease.task_id,
            lease.lease_id,
            output_tokens=new.output_tokens,
            cost_usd=charged.cost_usd,
            input_tokens=new.input_tokens + new.cache_read_tokens + new.cache_write_tokens,
        )


def refuse_negative(new: NewEvent) -> None:
    """Only admins correct."""
    if new.cost_usd is not None and new.cost_usd < 0:
        raise Invalid.at("/cost_usd", "too_small", "Only an admin corrects, without a lease; cost_usd must be >= 0.")


def _spent(new: NewEvent, **whose: Any) -> Spent:
    return Spent(
        usage_key=new.usage_key,
        provider=new.provider,
        model=new.model,
        operation=new.operation,
        input_tokens=new.input_tokens,
        output_tokens=new.output_tokens,
        cache_read_tokens=new.cache_read_tokens,
        cache_write_tokens=new.cache_write_tokens,
        estimated=new.estimated,
        note=new.note,
        cost_usd=None if new.cost_usd is None else Decimal(repr(new.cost_usd)),
        **whose,
    )
