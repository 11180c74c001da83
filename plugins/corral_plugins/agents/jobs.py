"""Background jobs of the `agents` plugin, which remove expired tokens and deleted agents."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.events.log import LoggedEvent
from corral_plugins.agents.api import Agents
from corral_plugins.agents.models import Agent, AgentToken, AgentVersion
from corral_plugins.agents.service.management import AgentManagement
from corral_plugins.agents.service.tokens import AgentTokens
from corral_plugins.cost.api import Costs

BATCH_SIZE = 500
PURGE_AFTER_SECONDS = 30 * 86_400


def detach_deleted_agent(agent_id: str, management: AgentManagement) -> None:
    """Detach a deleted agent from tasks that still wait for it."""
    management.detach_tasks(agent_id)


def delete_expired_tokens() -> None:
    """Delete a batch of expired agent tokens."""
    old = AgentToken.select(AgentToken.id).where(AgentToken.expires_at <= clock.now()).limit(BATCH_SIZE)
    AgentToken.delete().where(AgentToken.id.in_(old)).execute()


async def purge_deleted_agents(work: Work) -> None:
    """Delete agents that were marked as deleted at least 30 days ago, and the versions of these agents.

    Each batch is deleted in its own unit of work.
    """
    while await work(purge_one_batch) == BATCH_SIZE:
        pass


def purge_one_batch() -> int:
    """Delete at most `BATCH_SIZE` agents that were marked as deleted at least 30 days ago.

    Return the number of deleted agents.
    """
    over = Agent.deleted_at < clock.now(-PURGE_AFTER_SECONDS)
    old = [row.id for row in Agent.select(Agent.id).where(over).limit(BATCH_SIZE)]
    if old:
        AgentVersion.delete().where(AgentVersion.agent_id.in_(old)).execute()
        AgentToken.delete().where(AgentToken.agent_id.in_(old)).execute()
        Agent.delete().where(Agent.id.in_(old)).execute()
    return len(old)


def end_tokens_of_purged_user(event: LoggedEvent, tokens: AgentTokens) -> None:
    """Delete the tokens that a purged user created.

    The tokens of a deactivated user are kept, but every request with them is refused.
    """
    tokens.revoke_tokens_of_user(event.object_id)


def pause_agent_over_budget(event: LoggedEvent, agents: Agents, cost: Costs | None) -> None:
    """Pause an agent that has used up its own budget, unless the budget was raised in the meantime."""
    agent_id = event.payload()["agent_id"]
    budget = cost.agent_budgets([agent_id]).get(agent_id) if cost is not None and agent_id is not None else None
    if budget is not None and budget.is_exceeded:
        agents.pause_automatically(agent_id, "budget")
