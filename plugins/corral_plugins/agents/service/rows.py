"""Reads agent rows for a caller, changes them, and builds their API representations.

A row is updated only if it has not changed since it was read. The API representation of an agent contains warnings
about conditions that would prevent the agent from working.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.errors import NotFound, Unavailable
from corral.ids import new_id
from corral_plugins.agents.models import LIVING, Agent, AgentVersion
from corral_plugins.agents.service.configuration_conversion import (
    NO_REVIEW,
    usd_of,
    version_configuration,
    worker_selector_view,
)
from corral_plugins.agents.shapes import AgentView, Status
from corral_plugins.cost.api import Costs
from corral_plugins.llm.api import LLM, AgentModel
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import Tools, unserved_tools
from corral_plugins.workers.api import WorkerFacts, Workers

TRIES = 5
"""The maximum number of attempts to change a row that other units of work change at the same time."""


def find_readable_agent(agent_id: str, caller: Principal) -> Agent:
    """Return the agent. Raise `NotFound` if it was deleted, does not exist, or is hidden from the caller."""
    row: Agent | None = Agent.get_or_none((Agent.id == agent_id) & LIVING & visible(Agent, caller))
    if row is None:
        raise NotFound("There is no agent with this id.")
    return row


def require_readable_agent(agent_id: str, caller: Principal) -> None:
    """Raise `NotFound` unless `find_readable_agent` would find the agent.

    Unlike `find_readable_agent`, this function reads only the id.
    """
    if not Agent.select(Agent.id).where((Agent.id == agent_id) & LIVING & visible(Agent, caller)).exists():
        raise NotFound("There is no agent with this id.")


def find_writable_agent(agent_id: str, caller: Principal) -> Agent:
    """Return the agent if the caller may change it.

    Raise `NotFound` if no such agent is visible to the caller, and `Forbidden` if the caller is neither its owner nor
    an admin.
    """
    row = find_readable_agent(agent_id, caller)
    require_owner(caller, row.created_by, what="agent", manage="agents.manage")
    return row


def update_if_unchanged(row: Agent, values: dict[str, Any], *guards: Any) -> bool:
    """Write `values` and increment the version, if the row has not changed since it was read and all guards hold.

    Return whether the row was written. The `guards` are additional SQL conditions on the stored row.
    """
    unchanged: Any = (Agent.id == row.id) & LIVING & (Agent.version == row.version)
    for guard in guards:
        unchanged &= guard
    changes = {**values, "version": row.version + 1, "updated_at": clock.now()}
    return bool(Agent.update(changes).where(unchanged).execute())


def is_state_unchanged(row: Agent) -> Any:
    """Return an SQL condition that is true if the stored state and number of leases equal those in `row`."""
    reason = Agent.status_reason.is_null() if row.status_reason is None else Agent.status_reason == row.status_reason
    return (Agent.status == row.status) & (Agent.active_tasks == row.active_tasks) & reason


def has_leases(tasks: Tasks | None, agent_id: str) -> bool:
    """Return whether the agent holds a live lease.

    Call this function after reading the row of the agent, so that `is_state_unchanged` detects leases that begin later.
    """
    return tasks is not None and bool(tasks.leased_task_ids([agent_id]).get(agent_id))


def contention_error() -> Unavailable:
    """Return the error to raise if other units of work changed the row during every attempt to update it."""
    return Unavailable(
        "The agent was changed by another request at the same time; repeat the request.", code="overloaded"
    )


def add_version(row: Agent, changed: list[str], by: Principal) -> None:
    """Store the agent's configuration as a new version, numbered `row.config_version`."""
    AgentVersion.insert(
        id=new_id(),
        agent_id=row.id,
        n=row.config_version,
        configuration=version_configuration(row),
        changed_fields=changed,
        created_by=by.user_id,
        created_at=clock.now(),
    ).execute()


# -- representations


class AgentViews:
    """Builds API representations of agents. A list of agents needs only one query to each of the other plugins."""

    cost: Costs | None
    llm: LLM | None
    tasks: Tasks | None
    tools: Tools | None
    workers: Workers | None

    def view_of(self, row: Agent) -> AgentView:
        """Return the API representation of one agent."""
        return self.views_of([row])[0]

    def views_of(self, rows: Sequence[Agent]) -> list[AgentView]:
        """Return the API representations of a page of agents."""
        working = [row.id for row in rows if row.active_tasks > 0]
        live = self.tasks.leased_task_ids(working) if self.tasks is not None and working else {}
        bound = {row.worker_id for row in rows if row.worker_id is not None}
        warnings = _AgentWarnings(self.llm, self.tools, self.workers, bound)
        spent = self.cost.spent_by_agents([row.id for row in rows]) if self.cost is not None else {}
        return [
            _agent_view(
                row,
                live.get(row.id, []),
                warnings.warnings_of(row),
                spent.get(row.id),
                is_blocked=warnings.is_blocked(row),
            )
            for row in rows
        ]


class _AgentWarnings:
    """Determines the warnings for the agents in one response, and which of the agents are blocked by circuit breakers.

    Facts that several agents share are read only once.
    """

    def __init__(self, llm: LLM | None, tools: Tools | None, workers: Workers | None, bound: Collection[str]) -> None:
        self._llm, self._tools, self._workers = llm, tools, workers
        self._models: dict[tuple[str | None, str | None, tuple[str, ...]], list[AgentModel]] = {}
        self._fleet: list[WorkerFacts] | None = None
        self._of_server: frozenset[str] | None = None
        self._bound = workers.find_many(sorted(bound)) if workers is not None and bound else {}

    def warnings_of(self, row: Agent) -> list[str]:
        """Return the warning codes for an agent. The most general warning comes first."""
        return self._model_warnings(row) + self._worker_warnings(row) + self._tool_warnings(row)

    def _model_warnings(self, row: Agent) -> list[str]:
        """Return a warning if the gateway cannot call the agent's primary model, or the provider does not list it."""
        models = self._models_of(row)
        if not models or (models[0].problem is None and models[0].listed):
            return []
        return ["model_not_found" if models[0].is_provider_ready else "provider_not_configured"]

    def is_blocked(self, row: Agent) -> bool:
        """Return whether open circuit breakers reject calls to every model that the gateway could use for the agent.

        As soon as one of the circuit breakers may admit a call again, the agent no longer counts as blocked, so that
        its next task can try the model.
        """
        usable = [model for model in self._models_of(row) if model.problem is None]
        return bool(usable) and not any(model.is_callable for model in usable)

    def _models_of(self, row: Agent) -> list[AgentModel]:
        if self._llm is None:
            return []
        key = (row.llm_provider, row.llm_model, tuple(row.config.get("fallback_models") or ()))
        if key not in self._models:
            self._models[key] = self._llm.models_for_agent(*key)
        return self._models[key]

    def _worker_warnings(self, row: Agent) -> list[str]:
        if self._workers is None:
            return []
        if row.worker_id is not None:
            worker = self._bound.get(row.worker_id)
            if worker is not None and not worker.is_approved:
                return ["worker_not_approved"]
            return [] if worker is not None and worker.status in ("online", "draining") else ["worker_offline"]
        if row.worker_group is None and not row.worker_labels:
            return []
        return [] if self._suited_workers(row) else ["worker_offline"]

    def _suited_workers(self, row: Agent) -> list[WorkerFacts]:
        """Return the online workers that match the agent's worker selector."""
        return [
            worker
            for worker in self._online_workers()
            if (row.worker_id is None or row.worker_id == worker.id)
            and row.worker_group in (None, worker.group)
            and row.worker_labels.items() <= worker.labels.items()
        ]

    def _online_workers(self) -> list[WorkerFacts]:
        if self._fleet is None:
            self._fleet = self._workers.online_workers() if self._workers is not None else []
        return self._fleet

    def _server_tools(self) -> frozenset[str]:
        if self._of_server is None:
            self._of_server = self._tools.server_tools() if self._tools is not None else frozenset()
        return self._of_server

    def _tool_warnings(self, row: Agent) -> list[str]:
        """Return warnings for tools that no matching worker offers, or that only some matching workers offer."""
        if not row.enabled_tools:
            return []
        of_server = self._server_tools()
        workers = self._suited_workers(row) or self._online_workers()
        lacked = [unserved_tools(row.enabled_tools, worker.tools, of_server) for worker in workers]
        lacked = lacked or [unserved_tools(row.enabled_tools, [], of_server)]
        found = []
        for tool in row.enabled_tools:
            if any(tool in each for each in lacked):
                kind = "tool_unavailable" if all(tool in each for each in lacked) else "tool_not_offered"
                found.append(f"{kind}:{tool}")
        return found


def _agent_view(
    row: Agent, task_ids: list[str], warnings: list[str], spent_micro: int | None, *, is_blocked: bool
) -> AgentView:
    is_paused = is_blocked and row.status in ("idle", "busy")
    return AgentView(
        id=row.id,
        version=row.version,
        config_version=row.config_version,
        created_by=row.created_by,
        created_at=row.created_at,
        updated_at=row.updated_at,
        name=row.name,
        description=row.description,
        role=row.role,
        llm_provider=row.llm_provider,
        llm_model=row.llm_model,
        system_prompt=row.system_prompt,
        enabled_tools=row.enabled_tools,
        tool_policy=row.tool_policy,
        worker_id=row.worker_id,
        worker_selector=worker_selector_view(row),
        config=row.config,
        max_concurrent_tasks=row.max_concurrent_tasks,
        monthly_budget_usd=usd_of(row.monthly_budget_micro),
        max_cost_per_task_usd=usd_of(row.max_cost_per_task_micro),
        retry_policy=row.retry_policy,
        stall_policy=row.stall_policy,
        review_policy=row.review_policy or NO_REVIEW,
        tags=row.tags,
        metadata=row.metadata,
        status="paused" if is_paused else cast(Status, row.status),
        status_reason="circuit_open" if is_paused else row.status_reason,
        current_task_ids=task_ids,
        active_tasks=row.active_tasks,
        last_active_at=row.last_active_at or None,
        spent_month_usd=None if spent_micro is None else spent_micro / 1e6,
        warnings=warnings,
    )
