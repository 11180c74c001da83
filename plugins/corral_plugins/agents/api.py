"""The public interface of agents: shapes, events, the service `Agents`, and `AgentStatistics`, which it uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "agent_busy": (409, "The agent has live leases"),
        "budget_exhausted": (409, "The budget is used up"),
        "circuit_open": (503, "The circuit breaker is open"),
    }
)


class AgentFacts(msgspec.Struct, frozen=True, kw_only=True):
    """An agent for claims and calls of models: its configuration of version `version`, its state and its slots."""

    id: str
    name: str
    role: str
    owner_id: str
    status: str  # offline | idle | busy | draining | paused | error
    status_reason: str | None
    version: int  # of the configuration (GET /agents/{id}/versions)
    llm_provider: str | None
    llm_model: str | None
    system_prompt: str
    enabled_tools: list[str]
    tool_policy: dict[str, Any]
    worker_id: str | None
    worker_group: str | None
    worker_labels: dict[str, str]
    config: dict[str, Any]  # temperature, max_tokens, max_steps, fallback_models, output_schema, memory, knowledge
    max_concurrent_tasks: int
    active_tasks: int
    max_cost_per_task_usd: float | None
    retry_policy: dict[str, Any] | None
    stall_policy: dict[str, Any] | None
    review_policy: dict[str, Any]
    last_active_at: str | None

    @property
    def claims(self) -> bool:
        """Whether its state lets it claim (`idle` or `busy`)."""
        return self.status in ("idle", "busy")


class Agents(Protocol):
    """Joins the caller's unit. Units lock in the order task, agent, worker."""

    def facts(self, agent_id: str) -> AgentFacts | None:
        """A living agent, or None."""
        ...

    def facts_of(self, agent_ids: Sequence[str]) -> dict[str, AgentFacts]:
        """Living agents by id, in one query."""
        ...

    def eligible(
        self, *, worker_id: str, group: str | None, labels: dict[str, str], agent_ids: Sequence[str] | None
    ) -> list[AgentFacts]:
        """The agents that this worker may serve now: fewest leases first, then the longest idle.

        They are `idle` or `busy`, have a free slot, are bound to no other worker, and their selector matches.
        `agent_ids` limits the result to these agents.
        """
        ...

    def started(self, role: str | None) -> list[AgentFacts]:
        """Living agents that are `idle` or `busy`, of this role if one is given."""
        ...

    def naming_provider(self, provider: str) -> list[str]:
        """Ids of living agents that use this provider of models, at most 50."""
        ...

    def any_with_role(self, role: str) -> bool:
        """Whether a living agent of this role exists."""
        ...

    def lease_started(self, agent_id: str) -> bool:
        """Take a slot by one guarded update. Returns False when the agent may not claim or has no free slot."""
        ...

    def lease_ended(self, agent_id: str) -> None:
        """Release a slot; with the last one `busy` becomes `idle` and `draining` becomes `offline`.

        Does nothing for a deleted agent.
        """
        ...

    def attempt_ended(self, agent_id: str, *, configuration_failure: bool) -> None:
        """Count failures that a retry cannot cure (`provider_error` of a bad key or unknown model).

        After `agents.error_after_failures` of them in a row the state becomes `error`.
        """
        ...


class AttemptStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of the attempts of an agent, at most of the newest 10,000.

    Null means unknown; the rate and the durations are null without ended attempts.
    """

    attempts: int | None = None
    completed: int | None = None
    failed: int | None = None
    success_rate: float | None = None  # 0 to 1, of ended attempts
    avg_duration_ms: int | None = None
    p95_duration_ms: int | None = None
    cost_usd: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    stalls: int | None = None


class AgentStatistics(Protocol):
    """Statistics of agents, provided by the plugin that stores attempts (`tasks`). Joins the caller's unit."""

    def of_agent(self, agent_id: str, *, since: str) -> AttemptStatistics:
        """Statistics of the attempts that began at `since` (an instant) or later."""
        ...

    def of_versions(self, agent_id: str, versions: Sequence[int]) -> dict[int, AttemptStatistics]:
        """Statistics of the attempts of each of these versions of the configuration, in one query."""
        ...


class AgentStatus(Event, kw_only=True):
    """An agent's state changed."""

    event = "agent.status"

    agent_id: str
    name: str
    before: str = msgspec.field(name="from")
    after: str = msgspec.field(name="to")
    reason: str | None


class AgentCreated(Event, kw_only=True):
    """An agent was created."""

    event = "agent.created"

    agent_id: str
    name: str
    role: str


class AgentUpdated(Event, kw_only=True):
    """A person changed an agent. `version` is the version of its configuration."""

    event = "agent.updated"

    agent_id: str
    version: int
    changed_fields: list[str]


class AgentDeleted(Event, kw_only=True):
    """An agent was deleted."""

    event = "agent.deleted"

    agent_id: str
    name: str
