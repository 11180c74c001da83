"""Cost events reported through the API: costs that attempts incurred outside the gateway, and admins' corrections."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden, Invalid
from corral_plugins.cost.api import BillableUsage, ChargedCost
from corral_plugins.cost.service.ledger import CostLedger
from corral_plugins.cost.shapes import CostEventView, NewCostEvent
from corral_plugins.tasks.api import LeaseFacts, Tasks


class ReportedCostResult(msgspec.Struct, frozen=True):
    """The result of recording a reported cost. `is_new` is false if an event with the same usage key already existed.

    `lease_ended` means that the report arrived after the lease had ended. The event is recorded nevertheless, because
    the money was spent.
    """

    event: CostEventView
    is_new: bool
    lease_ended: bool = False


class ReportedCosts:
    """Records reported costs. Every method runs in the caller's unit of work."""

    tasks: Tasks | None

    def __init__(self, ledger: CostLedger) -> None:
        self._ledger = ledger

    def record_report(self, new: NewCostEvent, lease_id: str | None, by: Principal) -> ReportedCostResult:
        """Record a reported cost event.

        If `lease_id` is given, the event belongs to the attempt that the lease identifies. Otherwise, only admins may
        record the event. Raise `Invalid` if a report with a lease names no task or has a negative cost, `Conflict`
        (`lease_lost`) if the task has no such lease, and `Forbidden` if the caller may not report this cost.
        """
        if lease_id is None:
            return self._record_as_admin(new, by)
        lease = self._lease_of_report(new, lease_id, by)
        if new.cost_usd is not None and new.cost_usd < 0:
            detail = "cost_usd must not be negative; only admins may correct costs, without a lease."
            raise Invalid.at("/cost_usd", "too_small", detail)
        spent = _billable_usage(
            new,
            agent_id=lease.agent_id,
            task_id=lease.task_id,
            attempt_id=lease.attempt_id,
            user_id=lease.requester_id,
            run_id=lease.workflow_run_id,
        )
        charged = self._ledger.record_cost(spent)
        if not charged.repeated:
            self._add_to_task(new, lease, charged)
        return ReportedCostResult(self._ledger.get_event(charged.event_id), not charged.repeated, not lease.is_live)

    def _record_as_admin(self, new: NewCostEvent, by: Principal) -> ReportedCostResult:
        if not by.may("cost.write"):
            raise Forbidden("Only admins may report costs without a lease.")
        ids = {name: getattr(new, name) for name in ("agent_id", "task_id", "user_id", "conversation_id", "run_id")}
        charged = self._ledger.record_cost(
            _billable_usage(new, **{name: id and id.lower() for name, id in ids.items()})
        )
        return ReportedCostResult(self._ledger.get_event(charged.event_id), not charged.repeated)

    def _lease_of_report(self, new: NewCostEvent, lease_id: str, by: Principal) -> LeaseFacts:
        task_id = (new.task_id or by.task_id or "").lower()
        if not task_id:
            raise Invalid.at("/task_id", "required", "task_id is required together with lease_id.")
        lease = None if self.tasks is None else self.tasks.lease_facts(task_id, lease_id)
        if lease is None:
            raise Conflict("The task has no lease with this id.", code="lease_lost")
        if by.worker_id != lease.worker_id and by.lease_id != lease.lease_id:
            raise Forbidden("This lease is held by another worker.")
        return lease

    def _add_to_task(self, new: NewCostEvent, lease: LeaseFacts, charged: ChargedCost) -> None:
        """Add reported tokens and their cost to the task's counters, which count cache tokens as input tokens."""
        assert self.tasks is not None
        self.tasks.record_usage(
            lease.task_id,
            lease.lease_id,
            output_tokens=new.output_tokens,
            cost_usd=charged.cost_usd,
            input_tokens=new.input_tokens + new.cache_read_tokens + new.cache_write_tokens,
        )


def _billable_usage(new: NewCostEvent, **attribution: Any) -> BillableUsage:
    return BillableUsage(
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
        **attribution,
    )
