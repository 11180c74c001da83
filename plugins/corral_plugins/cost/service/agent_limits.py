"""The budgets of agents, which limit their monthly costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corral_plugins.cost.api import AgentBudget
from corral_plugins.cost.models import AgentLimit, BudgetCounter
from corral_plugins.cost.service import budget_counters
from corral_plugins.cost.service.budget_counters import CounterState
from corral_plugins.cost.service.budget_limit_cache import AGENT, BudgetLimitCache, Limit, increment_revision
from corral_plugins.cost.service.periods import current_period


class AgentLimits:
    """Stores and reads the monthly budgets of agents. Every method runs in the caller's unit of work."""

    def __init__(self, limits: BudgetLimitCache) -> None:
        self._limits = limits

    def set_limit(self, agent_id: str, limit_micro_usd: int | None) -> None:
        """Set or remove the budget of an agent. Implements `Costs.set_agent_limit`."""
        if self._limits.current().agents.get(agent_id) == limit_micro_usd:
            return
        increment_revision()
        if limit_micro_usd is None:
            AgentLimit.delete().where(AgentLimit.agent_id == agent_id).execute()
            BudgetCounter.delete().where((BudgetCounter.scope == AGENT) & (BudgetCounter.key == agent_id)).execute()
            self._limits.reload()
            return
        AgentLimit.insert(agent_id=agent_id, limit_micro=limit_micro_usd).on_conflict(
            conflict_target=[AgentLimit.agent_id], update={AgentLimit.limit_micro: limit_micro_usd}
        ).execute()
        budget_counters.apply_limit(self._limits.reload(), Limit(AGENT, agent_id, limit_micro_usd, is_hard=True))

    def lift(self, agent_id: str) -> None:
        """Suspend the budget of an agent for the rest of the current budget period."""
        limits = self._limits.current()
        for limit in limits.of(agent_id):
            if limit.scope == AGENT:
                period = current_period(limits.zone)
                budget_counters.create_if_missing(limits, limit, period)
                BudgetCounter.update(lifted=True).where(budget_counters.condition(limit, period)).execute()

    def budgets_of(self, agent_ids: Sequence[str]) -> dict[str, AgentBudget]:
        """Return the budgets of the given agents. Agents without a budget are omitted.

        Implements `Costs.agent_budgets`.
        """
        limits = self._limits.current()
        limited = [agent_id for agent_id in agent_ids if agent_id in limits.agents]
        if not limited:
            return {}
        states = self._states(limited, current_period(limits.zone).name)
        return {agent_id: _budget_of(limits.agents[agent_id], states.get(agent_id)) for agent_id in limited}

    def budgets(self) -> dict[str, AgentBudget]:
        """Return the budgets of all agents that have a budget."""
        return self.budgets_of(sorted(self._limits.current().agents))

    @staticmethod
    def _states(agent_ids: Sequence[str], period: str) -> dict[str, CounterState]:
        columns = [getattr(BudgetCounter, name) for name in CounterState._fields]
        of_agents = (BudgetCounter.scope == AGENT) & (BudgetCounter.period == period)
        found: Any = BudgetCounter.select(BudgetCounter.key, *columns).where(of_agents).tuples()
        wanted = set(agent_ids)
        return {key: CounterState(*state) for key, *state in found if key in wanted}


def _budget_of(limit_micro: int, state: CounterState | None) -> AgentBudget:
    """Return the budget of an agent. `state` is None if the counter of a new period does not exist yet."""
    if state is None:
        return AgentBudget(limit=limit_micro, spent=0, reserved=0, is_exceeded=False)
    return AgentBudget(
        limit=limit_micro,
        spent=state.spent_micro,
        reserved=state.reserved_micro,
        is_exceeded=budget_counters.is_exceeded(state) and not state.lifted,
    )
