"""Reserves money for claims. A claim reserves an estimate of the cost of each attempt.

The estimate is the cost limit of the task, or else the 90th percentile of the costs of the agent's last 20 attempts, or
else the setting `cost.default_attempt_usd`. Models that cost nothing need no reservation.
"""

from __future__ import annotations

import math

import msgspec

from corral import clock
from corral.database.statement import Statement
from corral_plugins.agents.api import AgentFacts
from corral_plugins.cost.api import BudgetRefused, BudgetScope, Costs, Headroom, NewReservation, TokenCounts
from corral_plugins.tasks.models import Attempt, TaskRow
from corral_plugins.tasks.service.agent_models import AgentModels

GRACE_SECONDS = 5
"""The time after the end of the lease at which the reservation expires."""
RECENT_ATTEMPTS, PERCENTILE = 20, 0.9
WARNING_FRACTION = 0.8
_MILLION = TokenCounts(input_tokens=1_000_000, output_tokens=1_000_000)
_RECENT_COSTS = Statement(
    lambda p: (
        Attempt.select(Attempt.cost_micro)
        .where((Attempt.agent_id == p("agent")) & Attempt.finished_at.is_null(False))
        .order_by(Attempt.created_at.desc())
        .limit(RECENT_ATTEMPTS)
        .tuples()
    )
)


class CostLimit(msgspec.Struct, frozen=True):
    """What the cost limit of a task leaves to its next attempt, and the cost at which the attempt is warned."""

    left_micro: int
    warning_micro: int


def cost_limit_of(row: TaskRow, agent: AgentFacts) -> CostLimit | None:
    """Return what is left of the cost limit of the task, or else of the agent's limit for each task."""
    usd = row.get("max_cost_usd")
    limit = agent.max_cost_per_task_micro if usd is None else round(usd * 1e6)
    if limit is None:
        return None
    warning = math.ceil(limit * WARNING_FRACTION)
    return CostLimit(max(0, limit - row.cost_micro), max(1, warning - row.cost_micro))


class ClaimBudgets:
    """Estimates and reserves the costs of attempts. Every method runs in the caller's unit of work."""

    cost: Costs | None

    def __init__(self, models: AgentModels) -> None:
        self._models = models

    def plan(self) -> ClaimPlan:
        """Return a plan for one claim."""
        return ClaimPlan(self.cost, self._models)

    def reserve(self, row: TaskRow, agent: AgentFacts, *, attempt_id: str, lease_until: str, amount: int) -> None:
        """Reserve the estimated cost of an attempt. Raise `BudgetRefused` if a budget does not admit it."""
        if self.cost is None or not amount:
            return
        limit = cost_limit_of(row, agent)
        self.cost.reserve(
            NewReservation(
                holder="attempt",
                holder_id=attempt_id,
                amount_micro_usd=amount,
                expires_at=clock.format_instant(clock.parse_instant(lease_until) + GRACE_SECONDS),
                agent_id=agent.id,
                task_id=row.id,
                lease_id=row.lease_id,
                attempt_limit_micro_usd=None if limit is None else limit.left_micro,
            )
        )


class ClaimPlan:
    """The estimated costs of the tasks that one claim chooses.

    A plan compares the estimates with what the budgets leave, without locking anything. The reservations at the end of
    the claim decide.
    """

    def __init__(self, cost: Costs | None, models: AgentModels) -> None:
        self._cost, self._models = cost, models
        self._headrooms: dict[str, Headroom] = {}
        self._planned: dict[str, int] = {}  # by agent; the key of the installation is empty
        self._needs: dict[str, int] = {}
        self.has_refused = False

    @property
    def reason(self) -> str:
        """The reason for a claim without tasks."""
        return "budget_exhausted" if self.has_refused else "none"

    def amount_of(self, row: TaskRow, agent: AgentFacts) -> int:
        """Return the amount to reserve for an attempt, which is 0 if nothing limits its cost.

        Raise `BudgetRefused` if the agent's model has no price and such models are refused.
        """
        limit = cost_limit_of(row, agent)
        if self._cost is None:
            return 0
        if limit is None and not (self._cost.has_limits() and self._cost.is_limited(agent.id)):
            return 0
        if limit is None:
            return self._usual_amount(self._cost, agent)
        return self._amount(self._cost, agent, limit.left_micro)

    def _usual_amount(self, cost: Costs, agent: AgentFacts) -> int:
        if agent.id not in self._needs:
            recent = sorted(micro for (micro,) in _RECENT_COSTS.rows({"agent": agent.id}))
            rank = math.ceil(PERCENTILE * len(recent)) - 1
            estimate = recent[rank] if recent else cost.default_attempt_micro_usd()
            self._needs[agent.id] = self._amount(cost, agent, estimate)
        return self._needs[agent.id]

    def _amount(self, cost: Costs, agent: AgentFacts, estimate: int) -> int:
        """Return the amount to reserve if the costs of the attempt are estimated at `estimate`."""
        model = self._models.first_usable(agent)
        if model is None:  # the worker calls models of its own, and reports what they cost
            return max(1, estimate)
        provider, _, name = model.name.partition("/")
        return cost.amount_to_reserve(cost.quote(provider, name, _MILLION, free=model.free), estimate)

    def refusing_scope(self, row: TaskRow, agent: AgentFacts) -> BudgetScope | None:
        """Return the scope whose budget does not admit an attempt, besides the attempts already planned, or None."""
        try:
            amount = self.amount_of(row, agent)
        except BudgetRefused as refused:
            return refused.scope
        if not amount or self._cost is None:
            return None
        if agent.id not in self._headrooms:
            self._headrooms[agent.id] = self._cost.headroom(agent.id)
        room, limit = self._headrooms[agent.id], cost_limit_of(row, agent)
        if room.overall is not None and self._planned.get("", 0) + amount > room.overall:
            return "global"
        if room.agent is not None and self._planned.get(agent.id, 0) + amount > room.agent:
            return "agent"
        return "task" if limit is not None and amount > limit.left_micro else None

    def is_used_up(self, agent: AgentFacts) -> bool:
        """Return whether a budget leaves nothing to the agent, after a task of the agent was refused."""
        room = self._headrooms.get(agent.id, Headroom())
        return any(left is not None and left <= 0 for left in (room.overall, room.agent))

    def add(self, row: TaskRow, agent: AgentFacts) -> int:
        """Add an attempt to the plan. Return the amount to reserve for it."""
        amount = self.amount_of(row, agent)
        for key in ("", agent.id):
            self._planned[key] = self._planned.get(key, 0) + amount
        return amount
