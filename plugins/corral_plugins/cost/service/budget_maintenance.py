"""Background work for budgets: releases expired reservations, begins periods, resumes agents, checks counters."""

from __future__ import annotations

import logging
from typing import Any

from corral import clock
from corral.database.unit import locked
from corral.events.event import SystemAlert, emit
from corral.jobs.job import enqueue
from corral_plugins.agents.api import Agents
from corral_plugins.cost.models import BudgetCounter, Reservation
from corral_plugins.cost.service import budget_counters, reservations
from corral_plugins.cost.service.agent_limits import AgentLimits
from corral_plugins.cost.service.budget_counters import CANCEL_JOB, CounterState
from corral_plugins.cost.service.budget_limit_cache import BudgetLimitCache, Limit
from corral_plugins.cost.service.installation_budget import Budgets
from corral_plugins.cost.service.maintenance import BATCH_ROWS
from corral_plugins.cost.service.periods import current_period
from corral_plugins.cost.service.reservations import Reservations
from corral_plugins.tasks.api import LeaseRef, Tasks

log = logging.getLogger("corral.cost")

GRACE_SECONDS = 5
"""The number of seconds between the end of a lease and the release of its attempt's reservation."""
PAUSE_REASON = "budget"
EXCEEDED = "The budget is used up."
CANCEL_BATCH = 20
"""The maximum number of attempts that one transaction cancels. The limit keeps the transaction short."""


class BudgetMaintenance:
    """Does the background work for budgets. Every method runs in the caller's unit of work."""

    agents: Agents | None
    tasks: Tasks | None

    def __init__(
        self, limits: BudgetLimitCache, budgets: Budgets, agent_limits: AgentLimits, reserved: Reservations
    ) -> None:
        self._limits, self._budgets = limits, budgets
        self._agent_limits, self._reservations = agent_limits, reserved

    # -- reservations

    @staticmethod
    def has_expiring() -> bool:
        """Return whether any reservation has expired or must be extended."""
        return bool(reservations.find_expiring(clock.now(GRACE_SECONDS), 1))

    def release_expired(self) -> int:
        """Release at most one batch of expired reservations. Return the number of released and extended reservations.

        If the lease of an attempt was renewed, the reservation of the attempt is extended instead of released.
        """
        now = clock.now()
        found = reservations.find_expiring(clock.now(GRACE_SECONDS), BATCH_ROWS)
        expiries = self._expiries_of_live_leases(found)
        reservations.extend(expiries)
        expired = [row for row in found if row.id not in expiries and row.expires_at < now]
        for row in expired:
            log.warning("expired reservation released", extra={"holder": row.holder, "holder_id": row.holder_id})
            self._reservations.release(row.holder_id)
        return len(expiries) + len(expired)

    def _expiries_of_live_leases(self, found: list[Reservation]) -> dict[str, str]:
        leased = {row.lease_id: row for row in found if row.lease_id is not None and row.task_id is not None}
        if self.tasks is None or not leased:
            return {}
        now, expiries = clock.now(), {}
        for state in self.tasks.lease_states([LeaseRef(row.task_id, row.lease_id) for row in leased.values()]):
            until = None if state.expires_at is None else clock.parse_instant(state.expires_at) + GRACE_SECONDS
            if until is not None and (expires_at := clock.format_instant(until)) > now:
                expiries[leased[state.lease_id].id] = expires_at
        return expiries

    # -- periods and agents

    def lacks_counters(self) -> bool:
        """Return whether any limit may lack a counter for the current period, according to the limits in memory."""
        return self._budgets.lacks_counters()

    def create_counters(self) -> int:
        """Create the missing counters of a new period, for at most one batch of limits.

        Return the number of checked limits.
        """
        return self._budgets.create_counters(BATCH_ROWS)

    def has_paused_agents(self) -> bool:
        """Return whether an agent is paused because of its budget."""
        return self.agents is not None and bool(self.agents.find_paused(PAUSE_REASON))

    def resume_agents(self) -> None:
        """Resume the agents that are paused because of their budgets but no longer exceed them."""
        if self.agents is None:
            return
        paused = self.agents.find_paused(PAUSE_REASON)
        budgets = self._agent_limits.budgets_of(paused)
        for agent_id in paused:
            if agent_id not in budgets or not budgets[agent_id].is_exceeded:
                self.agents.resume_automatically(agent_id, PAUSE_REASON)

    def cancel_running(self, agent_id: str | None, after: str) -> None:
        """Cancel one batch of attempts that hold reservations and whose task has an id greater than `after`.

        If the batch is full, another job is enqueued for the next batch.
        """
        if self.tasks is None:
            return
        held = Reservation.select(Reservation.task_id, Reservation.lease_id).where(
            Reservation.lease_id.is_null(False) & (Reservation.task_id > after)
        )
        if agent_id is not None:
            held = held.where(Reservation.agent_id == agent_id)
        leases: Any = list(held.order_by(Reservation.task_id).limit(CANCEL_BATCH).tuples())
        for task_id, lease_id in leases:
            self.tasks.stop_run(task_id, lease_id, kind="budget", reason=EXCEEDED)
        if len(leases) == CANCEL_BATCH:
            enqueue(CANCEL_JOB, agent_id=agent_id, after=leases[-1][0])

    # -- reconciliation

    def limits(self) -> list[Limit]:
        """Return all limits."""
        return self._limits.current().all()

    def reconcile(self, limit: Limit) -> None:
        """Set a counter to the sums of the costs and the reservations. Raise an alert if the counter was wrong.

        The counter is locked first. Costs and reservations change only together with the counter, so the sums cannot
        change.
        """
        period = current_period(self._limits.current().zone)
        columns = [getattr(BudgetCounter, name) for name in CounterState._fields]
        query = BudgetCounter.select(*columns).where(budget_counters.condition(limit, period))
        row = locked(query).tuples().first()
        if row is None:
            return
        state = CounterState(*row)
        expected = budget_counters.computed_values(limit, period)
        found = {name: getattr(state, name) for name in expected}
        if found == expected:
            return
        BudgetCounter.update(**expected).where(budget_counters.condition(limit, period)).execute()
        whose = f"agent {limit.key}" if limit.key else "the installation"
        detail = f"The counter of the budget of {whose} was {found} and was corrected to {expected}."
        log.error("budget counter corrected", extra={"detail": detail})
        alert = SystemAlert(
            kind="cost_mismatch", severity="warning", title="A budget counter was corrected", detail=detail[:2000]
        )
        emit(alert, object=("budget", limit.key or limit.scope))
