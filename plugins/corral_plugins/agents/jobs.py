"""What happens to agents in the background: ended tokens go, deleted agents go for good."""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.events.log import Record
from corral_plugins.agents.models import Agent, Token, Version
from corral_plugins.agents.service.directory import AgentDirectory
from corral_plugins.agents.service.tokens import AgentTokens

AT_ONCE = 500
PURGE_AFTER_SECONDS = 30 * 86_400


def detach(agent_id: str, directory: AgentDirectory) -> None:
    """Go on taking a deleted agent from the tasks that wait for it."""
    directory.detach(agent_id)


def sweep() -> None:
    """Remove tokens that have expired."""
    old = Token.select(Token.id).where(Token.expires_at <= clock.now()).limit(AT_ONCE)
    Token.delete().where(Token.id.in_(old)).execute()


async def purge(work: Work) -> None:
    """Remove agents that were deleted 30 days ago, with their versions, in small units."""
    while await work(purge_some) == AT_ONCE:
        pass


def purge_some() -> int:
    """Remove at most `AT_ONCE` of them; how many."""
    over = Agent.deleted_at < clock.now(-PURGE_AFTER_SECONDS)
    old = [row.id for row in Agent.select(Agent.id).where(over).limit(AT_ONCE)]
    if old:
        Version.delete().where(Version.agent_id.in_(old)).execute()
        Token.delete().where(Token.agent_id.in_(old)).execute()
        Agent.delete().where(Agent.id.in_(old)).execute()
    return len(old)


def forget_person(event: Record, tokens: AgentTokens) -> None:
    """A purged person's tokens are deleted; while deactivated they are refused at each call."""
    tokens.end_of_person(event.object_id)
