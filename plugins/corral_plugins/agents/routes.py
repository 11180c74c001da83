"""The HTTP routes for agents."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.errors import NotFound
from corral.http.answers import Answer, IfMatch
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.agents.service.management import AgentManagement
from corral_plugins.agents.service.states import AgentStates
from corral_plugins.agents.service.tokens import AgentTokens
from corral_plugins.agents.service.versions import AgentVersions
from corral_plugins.agents.shapes import (
    AgentBudget,
    AgentBudgetChange,
    AgentPatch,
    AgentQuery,
    AgentStats,
    AgentStatsQuery,
    AgentTokenQuery,
    AgentTokenView,
    AgentVersionDetail,
    AgentVersionView,
    AgentView,
    CloneAgent,
    CompareQuery,
    Comparison,
    DeleteAgentQuery,
    IssuedAgentToken,
    NewAgent,
    NewAgentToken,
    PauseRequest,
    RollBack,
    StartAgent,
    StopAgent,
    VersionQuery,
)

routes = Routes("/agents", tag="Agents")


@routes.get("/", needs="agents.read", raises=("invalid_cursor",))
def list_agents(query: AgentQuery, agents: AgentManagement, caller: Principal) -> Page[AgentView]:
    """List agents."""
    return agents.list(query, by=caller)


@routes.post(
    "/",
    needs="agents.write",
    status=201,
    redacted=True,
    raises=("duplicate", "unknown_reference", "quota_exceeded", "forbidden"),
)
def create_agent(body: NewAgent, agents: AgentManagement, caller: Principal) -> AgentView:
    """Create an agent. The agent is offline until it is started."""
    return agents.create(body, by=caller)


@routes.get("/{id}", needs="agents.read", live=True, raises=("not_found",))
def get_agent(id: str, agents: AgentManagement, caller: Principal) -> AgentView:
    """Get an agent."""
    return agents.get(id, by=caller)


@routes.patch(
    "/{id}",
    needs="agents.write",
    redacted=True,
    raises=("not_found", "forbidden", "duplicate", "unknown_reference", "precondition_failed", "overloaded"),
)
def update_agent(id: str, body: AgentPatch, match: IfMatch, agents: AgentManagement, caller: Principal) -> AgentView:
    """Change an agent.

    A change to the configuration creates a new version. Running attempts keep the version with which they started.
    """
    return agents.update(id, body, match, by=caller)


@routes.delete(
    "/{id}",
    needs="agents.write",
    raises=("not_found", "forbidden", "agent_busy", "precondition_failed", "overloaded"),
)
def delete_agent(
    id: str, query: DeleteAgentQuery, match: IfMatch, agents: AgentManagement, caller: Principal
) -> Answer[None]:
    """Delete an agent.

    The agent's name becomes available immediately, its tokens are revoked, and tasks that wait for it are detached. The
    `Corral-Affected` header contains the number of affected tasks.
    """
    affected = agents.delete(id, match, force=query.force, by=caller)
    return Answer(body=None, status=204, headers={"Corral-Affected": f"tasks={affected}"})


_ACTION = ("not_found", "forbidden", "invalid_state", "precondition_failed", "overloaded")


@routes.post("/{id}/start", needs="agents.write", raises=(*_ACTION, "budget_exhausted", "kill_switch"))
def start_agent(id: str, body: StartAgent, match: IfMatch, states: AgentStates, caller: Principal) -> AgentView:
    """Start an agent, so that it claims tasks.

    The field `warnings` in the response lists conditions that may prevent the agent from working.
    """
    return states.start(id, match, override=body.override, by=caller)


@routes.post("/{id}/stop", needs="agents.write", raises=_ACTION)
def stop_agent(id: str, body: StopAgent, match: IfMatch, states: AgentStates, caller: Principal) -> AgentView:
    """Stop an agent.

    The mode `immediate` revokes the agent's leases before the response is sent. Its tasks return to the queue without
    consuming an attempt, or are cancelled if `cancel_tasks` is set. The mode `drain` lets running tasks finish.
    """
    return states.stop(id, body, match, by=caller)


@routes.post("/{id}/pause", needs="agents.write", raises=_ACTION)
def pause_agent(id: str, body: PauseRequest, match: IfMatch, states: AgentStates, caller: Principal) -> AgentView:
    """Pause a started agent. The agent claims no further tasks, but its current tasks continue."""
    return states.pause(id, match, reason=body.reason, by=caller)


@routes.post("/{id}/resume", needs="agents.write", raises=(*_ACTION, "budget_exhausted", "kill_switch"))
def resume_agent(id: str, body: PauseRequest, match: IfMatch, states: AgentStates, caller: Principal) -> AgentView:
    """Resume a paused agent."""
    return states.resume(id, match, reason=body.reason, by=caller)


@routes.post(
    "/{id}/clone", needs="agents.write", status=201, raises=("not_found", "forbidden", "duplicate", "quota_exceeded")
)
def clone_agent(id: str, body: CloneAgent, agents: AgentManagement, caller: Principal) -> Answer[AgentView]:
    """Copy an agent under another name, without its memories and tokens.

    The caller owns the copy. The copy is offline.
    """
    copy = agents.clone(id, body.name, by=caller)
    return Answer(body=copy, headers={"Location": f"/api/v1/agents/{copy.id}"})


@routes.get("/{id}/versions", needs="agents.read", raises=("not_found", "invalid_cursor"))
def list_agent_versions(
    id: str, query: VersionQuery, versions: AgentVersions, caller: Principal
) -> Page[AgentVersionView]:
    """List the versions of an agent's configuration, newest first."""
    return versions.list(id, query, by=caller)


@routes.get("/{id}/versions/compare", needs="agents.read", raises=("not_found",))
def compare_agent_versions(id: str, query: CompareQuery, versions: AgentVersions, caller: Principal) -> Comparison:
    """Compare two versions.

    The response contains the fields that differ, and statistics about the attempts that used each version.
    """
    return versions.compare(id, query.before, query.after, by=caller)


@routes.get("/{id}/versions/{n}", needs="agents.read", raises=("not_found",))
def get_agent_version(id: str, n: str, versions: AgentVersions, caller: Principal) -> AgentVersionDetail:
    """Get one version of an agent with its complete configuration."""
    if not (n.isascii() and n.isdigit() and len(n) < 10):
        raise NotFound("The version must be a number.")
    return versions.get(id, int(n), by=caller)


@routes.post(
    "/{id}/rollback",
    needs="agents.write",
    raises=("not_found", "forbidden", "invalid_state", "unknown_reference", "precondition_failed", "overloaded"),
)
def roll_back_agent(id: str, body: RollBack, match: IfMatch, versions: AgentVersions, caller: Principal) -> AgentView:
    """Roll back an agent: create a new version with the content of an earlier version."""
    return versions.roll_back(id, body.version, match, by=caller)


@routes.get("/{id}/budget", needs="agents.read", raises=("not_found",))
def get_agent_budget(id: str, agents: AgentManagement, caller: Principal) -> AgentBudget:
    """Get the cost limits of an agent, and the amounts that it has spent and reserved in the current month."""
    return agents.get_budget(id, by=caller)


@routes.put(
    "/{id}/budget", needs="agents.write", raises=("not_found", "forbidden", "precondition_failed", "overloaded")
)
def update_agent_budget(
    id: str, body: AgentBudgetChange, match: IfMatch, agents: AgentManagement, caller: Principal
) -> AgentBudget:
    """Change the cost limits of an agent. A change creates a new version of the configuration."""
    return agents.change_budget(id, body, match, by=caller)


@routes.get("/{id}/stats", needs="agents.read", raises=("not_found",))
def get_agent_stats(id: str, query: AgentStatsQuery, versions: AgentVersions, caller: Principal) -> AgentStats:
    """Get statistics about an agent's attempts. Unknown values are null."""
    return versions.get_statistics(id, query.days, by=caller)


@routes.get("/{id}/tokens", needs="agents.write", raises=("not_found", "forbidden", "invalid_cursor"), no_store=True)
def list_agent_tokens(id: str, query: AgentTokenQuery, tokens: AgentTokens, caller: Principal) -> Page[AgentTokenView]:
    """List the standing tokens of an agent, without their secrets."""
    return tokens.list(id, query, by=caller)


@routes.post(
    "/{id}/tokens",
    needs="agents.write",
    own_session=True,
    status=201,
    no_store=True,
    raises=("not_found", "forbidden", "quota_exceeded"),
)
def create_agent_token(
    id: str, body: NewAgentToken, tokens: AgentTokens, caller: Principal
) -> Answer[IssuedAgentToken]:
    """Create a standing token for an agent that runs outside Corral's workers. Only this response contains the token.

    The token allows a request only if three conditions are met: the token's scopes include the required permission,
    agents may have this permission, and the token's creator still has it at the time of the request. An API key cannot
    create standing tokens.
    """
    issued = tokens.create(id, body, by=caller)
    return Answer(body=issued, headers={"Location": f"/api/v1/agents/{id}/tokens/{issued.id}"})


@routes.delete("/{id}/tokens/{token_id}", needs="agents.write", own_session=True, raises=("not_found", "forbidden"))
def end_agent_token(id: str, token_id: str, tokens: AgentTokens, caller: Principal) -> None:
    """Revoke a standing token immediately."""
    tokens.revoke(id, token_id, by=caller)
