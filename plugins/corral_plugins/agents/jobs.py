"""Background jobs of agents, which remove expired tokens and deleted agents."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.events.log import LoggedEvent
from corral_plugins.agents.models import Agent, Token, Version
from corral_plugins.agents.service.management import AgentManagement
from corral_plugins.agents.service.tokens import AgentTokens

BATCH_SIZE = 500
PURGE_AFTER_SECONDS = 30 * 86_400


def detach(agent_id: str, management: AgentManagement) -> None:
    """Detach a deleted agent from the remaining tasks that wait for it."""
    management.detach(agent_id)


def sweep() -> None:
    """Delete expired tokens."""
    old = Token.select(Token.id).where(Token.expires_at <= clock.now()).limit(BATCH_SIZE)
    Token.delete().where(Token.id.in_(old)).execute()


async def purge(work: Work) -> None:
    """Delete the agents that were marked as deleted 30 days ago, with their versions, in short units of work."""
    while await work(purge_some) == BATCH_SIZE:
        pass


def purge_some() -> int:
    """Delete at most `BATCH_SIZE` agents that were marked as deleted 30 days ago.

    Return the number of deleted agents.
    """
    over = Agent.deleted_at < clock.now(-PURGE_AFTER_SECONDS)
    old = [row.id for row in Agent.select(Agent.id).where(over).limit(BATCH_SIZE)]
    if old:
        Version.delete().where(Version.agent_id.in_(old)).execute()
        Token.delete().where(Token.agent_id.in_(old)).execute()
        Agent.delete().where(Agent.id.in_(old)).execute()
    return len(old)


def forget_person(event: LoggedEvent, tokens: AgentTokens) -> None:
    """Delete the tokens of a person whose account was purged.

    The tokens of a deactivated person are kept, and refused at each request.
    """
    tokens.end_of_person(event.object_id)
