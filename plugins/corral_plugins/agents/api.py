"""The public interface of the `agents` plugin: data types, events, and the protocols `Agents` and `AgentStatistics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "agent_busy": (
            409,
            "Workers hold leases for tasks of the agent",
            "Wait until the agent's running tasks have ended, cancel them, or pause the agent.",
        ),
        "budget_exhausted": (
            409,
            "The budget is used up",
            "Raise the budget of the agent or of the task, or wait for the next month.",
        ),
    }
)


class AgentFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about an agent that Corral needs to assign tasks to it and to call its model.

    `version` is the version of the configuration. `max_cost_per_task_micro` limits the cost, in micro-USD, of each task
    that has no limit of its own.
    """

    id: str
    name: str
    role: str
    owner_id: str
    status: str  # offline | idle | busy | draining | paused | error
    status_reason: str | None
    version: int  # the version of the configuration (GET /agents/{id}/versions)
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
    retry_policy: dict[str, Any] | None
    stall_policy: dict[str, Any] | None
    last_active_at: str | None
    max_cost_per_task_micro: int | None = None
    review_policy: dict[str, Any] | None = None  # null: no review

    @property
    def can_claim(self) -> bool:
        """Whether the current state of the agent allows it to claim tasks. This is true for `idle` and `busy`."""
        return self.status in ("idle", "busy")


class Agents(Protocol):
    """The service for agents. Every method runs in the caller's unit of work.

    A unit of work must lock rows in this order: tasks, agents, workers.
    """

    def find(self, agent_id: str) -> AgentFacts | None:
        """Return the agent, or None if it does not exist or is deleted."""
        ...

    def find_many(self, agent_ids: Sequence[str]) -> dict[str, AgentFacts]:
        """Return the agents with these ids, keyed by id. Deleted agents are omitted. Runs a single query."""
        ...

    def eligible_agents(
        self, *, worker_id: str, group: str | None, labels: dict[str, str], agent_ids: Sequence[str] | None
    ) -> list[AgentFacts]:
        """Return the agents that this worker may run now.

        The agents are sorted by their number of leases, fewest first, and then by their idle time, longest first. They
        are `idle` or `busy`, have a free slot, are not bound to another worker, and have a selector that matches the
        worker. If `agent_ids` is given, only agents with these ids are returned.
        """
        ...

    def started_agents(self, role: str | None) -> list[AgentFacts]:
        """Return the agents in the state `idle` or `busy` that have this role, or any role if `role` is None.

        Agents without a role are excluded.
        """
        ...

    def agents_using_provider(self, provider: str) -> list[str]:
        """Return the ids of at most 50 agents that are not deleted and use this model provider."""
        ...

    def has_role(self, role: str) -> bool:
        """Return whether an agent with this role exists and is not deleted."""
        ...

    def take_slot(self, agent_id: str, *, cause: tuple[str, ...] = ()) -> bool:
        """Occupy one of the agent's slots for concurrent tasks, with a single conditional UPDATE.

        Return False if the agent may not claim tasks or has no free slot. `cause` lists the ids of the triggers
        and tasks that led to the task. They are stored with the event about the agent's new state.
        """
        ...

    def release_slot(self, agent_id: str, *, cause: tuple[str, ...] = ()) -> None:
        """Release a slot of the agent. Does nothing for a deleted agent.

        When the last slot is released, the agent's state changes from `busy` to `idle`, or from `draining` to
        `offline`. `cause` has the same meaning as in `take_slot`.
        """
        ...

    def find_paused(self, reason: str) -> list[str]:
        """Return the ids of at most 500 agents that are paused for this reason, such as `budget`."""
        ...

    def pause_automatically(self, agent_id: str, reason: str) -> None:
        """Pause an agent automatically, that is, for a reason other than a person's decision.

        Does nothing if the agent is not started.
        """
        ...

    def resume_automatically(self, agent_id: str, reason: str) -> None:
        """Resume an agent that is paused for this reason. Does nothing if the agent is not paused for it."""
        ...

    def record_attempt_end(
        self, agent_id: str, *, configuration_failure: bool, stalled: bool, cause: tuple[str, ...] = ()
    ) -> None:
        """Record how an attempt ended, so that repeated configuration failures and stalled attempts are detected.

        A configuration failure is a `provider_error` that a retry cannot fix, for example because of an invalid key or
        an unknown model. After `agents.error_after_failures` consecutive failures, the state of the agent becomes
        `error`. `stalled` says whether `record_stall` was called for the attempt. If it was not called, the count of
        consecutive stalls is reset. `cause` has the same meaning as in `take_slot`.
        """
        ...

    def record_stall(self, agent_id: str, *, cause: tuple[str, ...] = ()) -> None:
        """Record that an attempt stalled. Call this method only when the attempt stalls for the first time.

        After `agents.pause_after_stalls` consecutive stalled attempts, the state of the agent becomes `paused`, with
        the reason `stalled`. `cause` has the same meaning as in `take_slot`.
        """
        ...


class AttemptStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics about an agent's attempts, limited to the newest 10,000 attempts.

    Null means unknown. The success rate and the durations are null if no attempt has ended.
    """

    attempts: int | None = None
    completed: int | None = None
    failed: int | None = None
    success_rate: float | None = None  # from 0 to 1, among ended attempts
    avg_duration_ms: int | None = None
    p95_duration_ms: int | None = None
    cost_usd: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    stalls: int | None = None


class AgentStatistics(Protocol):
    """Statistics about agents, provided by the `tasks` plugin, which stores attempts.

    Every method runs in the caller's unit of work.
    """

    def for_agent(self, agent_id: str, *, since: str) -> AttemptStatistics:
        """Return statistics about the agent's attempts that were created at or after `since`."""
        ...

    def for_versions(self, agent_id: str, versions: Sequence[int]) -> dict[int, AttemptStatistics]:
        """Return statistics about the attempts that used each of these configuration versions, keyed by version.

        Runs a single query.
        """
        ...


class AgentStatusChanged(Event, kw_only=True):
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
    """A person changed an agent. `version` is the version of the agent's configuration."""

    event = "agent.updated"

    agent_id: str
    version: int
    changed_fields: list[str]


class AgentDeleted(Event, kw_only=True):
    """An agent was deleted."""

    event = "agent.deleted"

    agent_id: str
    name: str
