"""Reserves money for claims. A claim reserves the estimated cost of each attempt.

The estimate is the amount left in the task's cost limit. For a task without a limit, it is the 90th percentile of the
costs of the agent's last 20 attempts, or else the setting `cost.default_attempt_usd`. Models that cost nothing need no
reservation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec
from peewee import fn

from corral import clock
from corral.database.unit import after_commit
from corral_plugins.agents.api import AgentFacts
from corral_plugins.cost.api import (
    BudgetRefused,
    BudgetScope,
    Costs,
    Headroom,
    NewReservation,
    TokenCounts,
    format_micro_usd,
)
from corral_plugins.tasks.models import Task, TaskRow
from corral_plugins.tasks.service.agent_models import AgentModels
from corral_plugins.tasks.service.usual_costs import UsualCosts

GRACE_SECONDS = 5
"""The time between the end of the lease and the expiry of the reservation."""
WARNING_FRACTION = 0.8
MAX_SHORTAGES = 20
"""The maximum number of agents for which a task keeps the last refused call."""
CHARACTERS_PER_TOKEN = 5  # more than tokens have, so that a cost estimated with it is too low rather than too high
_MILLION = TokenCounts(input_tokens=1_000_000, output_tokens=1_000_000)


class CostLimit(msgspec.Struct, frozen=True):
    """A task's cost limit.

    `left_micro` is the amount left for the next attempt. `warning_micro` is the cost of the attempt at which the worker
    is warned. All amounts are in micro-USD.
    """

    limit_micro: int
    left_micro: int
    warning_micro: int


def cost_limit_of(row: TaskRow, agent: AgentFacts) -> CostLimit | None:
    """Return the cost limit of a task and the amount that is left, or None if the cost is not limited.

    A task without a limit of its own has the limit that its agent sets for each task.
    """
    usd = row.get("max_cost_usd")
    limit = agent.max_cost_per_task_micro if usd is None else round(usd * 1e6)
    if limit is None:
        return None
    warning = math.ceil(limit * WARNING_FRACTION)
    return CostLimit(limit, max(0, limit - row.cost_micro), max(1, warning - row.cost_micro))


class RefusedCall(NamedTuple):
    """A call that was refused in an earlier attempt, because too little money was left in a budget.

    `scope` names the budget, `needed_micro` is the amount that the call needed, and `left_micro` is the amount that the
    budget had left.
    """

    scope: str
    needed_micro: int
    left_micro: int

    def describe(self) -> str:
        """Return a sentence that describes the refused call."""
        whose = "the installation" if self.scope == "global" else "the agent"
        return (
            f"The budget of {whose} did not allow a model call, which may cost {format_micro_usd(self.needed_micro)}: "
            f"{format_micro_usd(self.left_micro)} was left."
        )


def find_refused_call(row: TaskRow, agent: AgentFacts, model: str) -> RefusedCall | None:
    """Return the last call of the task that was refused for the agent's current version and model.

    Return None if no such call was refused.
    """
    stored = row.get("budget_shortages").get(agent.id)
    if stored is None or stored["configuration"] != [agent.version, model]:
        return None
    return RefusedCall(stored["scope"], stored["needed_micro"], stored["left_micro"])


def with_refused_call(row: TaskRow, agent: AgentFacts, model: str, refused_call: RefusedCall) -> dict[str, Any]:
    """Return the refused calls to store with the task, keyed by agent id.

    The result contains `refused_call` for this agent, and the calls that were stored earlier for other agents.
    """
    others = {key: each for key, each in row.get("budget_shortages").items() if key != agent.id}
    newest = dict(list(others.items())[1 - MAX_SHORTAGES :])
    return {**newest, agent.id: {"configuration": [agent.version, model], **refused_call._asdict()}}


class BudgetObstacle(NamedTuple):
    """A budget or cost limit that does not allow an attempt. The amounts are in micro-USD.

    If `is_known_call` is set, `needed` is the cost of a call that was refused earlier. Otherwise, `needed` is the
    estimated cost of an attempt. If `detail` is set, the description of the obstacle consists of `detail` and contains
    no amounts.
    """

    scope: BudgetScope
    needed: int = 0
    left: int = 0
    limit: int = 0
    is_known_call: bool = False
    detail: str | None = None


class ClaimBudgets:
    """Estimates and reserves the costs of attempts. Every method runs in the caller's unit of work."""

    cost: Costs | None

    def __init__(self, models: AgentModels, usual_costs: UsualCosts) -> None:
        self._models, self._usual_costs = models, usual_costs
        self._has_refused = False

    def least_call_cost(self, row: TaskRow, agent: AgentFacts) -> int:
        """Return the cost of the cheapest possible call for the task, in micro-USD, or 0 if no price is known."""
        model = self._models.first_usable_model(agent) if self.cost is not None else None
        if model is None or self.cost is None:
            return 0
        instructions = Task.select(fn.LENGTH(Task.instructions)).where(Task.id == row.id).scalar() or 0
        characters = len(agent.system_prompt) + int(instructions)
        tokens = TokenCounts(input_tokens=characters // CHARACTERS_PER_TOKEN, output_tokens=1)
        provider, _, name = model.name.partition("/")
        return self.cost.quote(provider, name, tokens, free=model.free).cost_micro_usd or 0

    def plan(self, *, skip_budgets: bool = False) -> ClaimPlan:
        """Return a plan for one claim.

        With `skip_budgets`, the plan does not read the remaining budgets, unless a budget refused an attempt in the
        last claim of this process. This is safe because the reservations check the budgets in any case. If a
        reservation is refused, the claim is planned again.
        """
        return ClaimPlan(
            self.cost, self._models, self._usual_costs, reads_budgets=self._has_refused or not skip_budgets
        )

    def remember_refusal(self, plan: ClaimPlan) -> None:
        """When the claim is committed, remember whether a budget refused one of its attempts."""
        if plan.has_refused != self._has_refused:
            after_commit(lambda: setattr(self, "_has_refused", plan.has_refused))

    def reserve(self, row: TaskRow, agent: AgentFacts, *, attempt_id: str, lease_until: str, amount: int) -> None:
        """Reserve the estimated cost of an attempt. Raise `BudgetRefused` if a budget does not allow the attempt."""
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

    A plan compares the estimates with the remaining budgets, without locking anything. Only the reservations at the end
    of the claim are binding. A plan that does not read the budgets assumes that they allow every attempt.
    """

    def __init__(
        self, cost: Costs | None, models: AgentModels, usual_costs: UsualCosts, *, reads_budgets: bool
    ) -> None:
        self._cost, self._models = cost, models
        self._usual_costs, self._reads_budgets = usual_costs, reads_budgets
        self._headrooms: dict[str, Headroom] = {}
        self._planned: dict[str, int] = {}  # by agent; the key of the installation is empty
        self._needs: dict[str, int] = {}
        self.has_refused = False

    @property
    def reason(self) -> str:
        """The reason to report if the claim leases no task."""
        return "budget_exhausted" if self.has_refused else "none"

    def reservation_for(self, row: TaskRow, agent: AgentFacts) -> int:
        """Return the amount to reserve for an attempt, or 0 if nothing limits the cost of the attempt.

        Raise `BudgetRefused` if the agent's model has no price and the settings refuse such models.
        """
        limit = cost_limit_of(row, agent)
        if self._cost is None:
            return 0
        if limit is None and not (self._cost.has_limits() and self._cost.is_limited(agent.id)):
            return 0
        if limit is not None:
            return self._reservation_for_estimate(self._cost, agent, limit.left_micro)
        usual, refused_call = self._usual_reservation(self._cost, agent), self._refused_call(row, agent)
        if refused_call is None or refused_call.needed_micro <= usual:
            return usual
        return self._reservation_for_estimate(self._cost, agent, refused_call.needed_micro)

    def _refused_call(self, row: TaskRow, agent: AgentFacts) -> RefusedCall | None:
        return find_refused_call(row, agent, self._models.model_name(agent)) if row.get("budget_shortages") else None

    def _usual_reservation(self, cost: Costs, agent: AgentFacts) -> int:
        if agent.id not in self._needs:
            usual = self._usual_costs.of_agent(agent.id)
            estimate = cost.default_attempt_micro_usd() if usual is None else usual
            self._needs[agent.id] = self._reservation_for_estimate(cost, agent, estimate)
        return self._needs[agent.id]

    def _reservation_for_estimate(self, cost: Costs, agent: AgentFacts, estimate: int) -> int:
        """Return the amount to reserve for an attempt with the estimated cost `estimate`."""
        model = self._models.first_usable_model(agent)
        if model is None:  # the worker calls models of its own, and reports what they cost
            return max(1, estimate)
        provider, _, name = model.name.partition("/")
        return cost.amount_to_reserve(cost.quote(provider, name, _MILLION, free=model.free), estimate)

    def find_obstacle(self, row: TaskRow, agent: AgentFacts) -> BudgetObstacle | None:
        """Return the budget or cost limit that prevents an attempt of the task, given the attempts already planned.

        Return None if nothing prevents the attempt.
        """
        try:
            amount = self.reservation_for(row, agent)
        except BudgetRefused as refused:
            return BudgetObstacle(refused.scope, detail=refused.detail)
        if not amount or self._cost is None:
            return None
        if agent.id not in self._headrooms:
            self._headrooms[agent.id] = self._cost.headroom(agent.id) if self._reads_budgets else Headroom()
        room, limit = self._headrooms[agent.id], cost_limit_of(row, agent)
        refused_call = self._refused_call(row, agent)
        is_known_call = limit is None and refused_call is not None and refused_call.needed_micro >= amount
        left = None if room.overall is None else room.overall - self._planned.get("", 0)
        if left is not None and amount > left:
            return BudgetObstacle("global", amount, left, room.overall_limit or 0, is_known_call)
        left = None if room.agent is None else room.agent - self._planned.get(agent.id, 0)
        if left is not None and amount > left:
            return BudgetObstacle("agent", amount, left, room.agent_limit or 0, is_known_call)
        if limit is not None and amount > limit.left_micro:
            return BudgetObstacle("task", amount, limit.left_micro, limit.limit_micro)
        return None

    def is_used_up(self, agent: AgentFacts) -> bool:
        """Return whether a budget that applies to the agent is used up.

        Called after a task of the agent was refused.
        """
        room = self._headrooms.get(agent.id, Headroom())
        return any(left is not None and left <= 0 for left in (room.overall, room.agent))

    def add(self, row: TaskRow, agent: AgentFacts) -> int:
        """Add an attempt to the plan. Return the amount to reserve for it."""
        amount = self.reservation_for(row, agent)
        for key in ("", agent.id):
            self._planned[key] = self._planned.get(key, 0) + amount
        return amount
