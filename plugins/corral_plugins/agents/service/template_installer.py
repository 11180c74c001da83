"""Installs agents from marketplace templates."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.database.unit import locked
from corral.errors import Forbidden
from corral.http.answers import ANY_VERSION
from corral.schema.conversion import convert
from corral_plugins.agents.models import LIVING, Agent
from corral_plugins.agents.service.configuration_conversion import (
    MAX_STEPS,
    NO_REVIEW,
    default_config,
    to_columns,
    usd_of,
    worker_selector_view,
)
from corral_plugins.agents.service.management import AgentManagement
from corral_plugins.agents.service.rows import find_readable_agent
from corral_plugins.agents.shapes import AgentPatch, AgentView, NewAgent
from corral_plugins.marketplace.api import InstalledObject, Installer, ObjectUse, functions_of
from corral_plugins.tools.api import Tools

Json = dict[str, Any]
COPIED = (
    "name",
    "description",
    "role",
    "llm_provider",
    "llm_model",
    "system_prompt",
    "enabled_tools",
    "tool_policy",
    "config",
    "max_concurrent_tasks",
    "retry_policy",
    "stall_policy",
    "tags",
    "metadata",
)
ECHO = "scripted/echo"  # the default model of an installation without any other
SET_MODEL = "Set a default model for all agents: corral settings set llm.default_model PROVIDER/MODEL"
DEFAULTS: Json = {
    "description": "",
    "role": "general",
    "llm_provider": None,
    "llm_model": None,
    "system_prompt": "",
    "enabled_tools": [],
    "tool_policy": {},
    "config": default_config(MAX_STEPS.default),
    "max_concurrent_tasks": 1,
    "retry_policy": None,
    "stall_policy": None,
    "tags": [],
    "metadata": {},
    "review_policy": NO_REVIEW,
    "worker_selector": {},
    "monthly_budget_usd": None,
    "max_cost_per_task_usd": None,
}


class AgentTemplateInstaller:
    """Installs marketplace templates of the kind `agent`.

    The services that the installer uses are set after the kernel has booted.
    """

    management: AgentManagement | None
    tools: Tools | None

    def definition(self) -> Installer:
        """Return the installer definition for the marketplace."""
        return Installer(
            kind="agent",
            title="Agent",
            schema=_schema(),
            write="agents.write",
            read="agents.read",
            **functions_of(self),
        )

    def check_spec(self, spec: Json) -> None:
        """Raise `Invalid` if the template's configuration is not valid for an agent."""
        to_columns(convert(NewAgent, spec), DEFAULTS["config"], enforces_budgets=True, performs_reviews=True)

    def find_existing(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the ids of the agents with these names, keyed by name. Names are compared case-insensitively."""
        keys = {name.strip().casefold(): name for name in names}
        rows: Any = Agent.select(Agent.name_key, Agent.id).where(LIVING & Agent.name_key.in_(list(keys))).tuples()
        return {keys[key]: str(agent_id) for key, agent_id in rows}

    def install(self, spec: Json, by: Principal) -> InstalledObject:
        """Create an agent. Tools that the caller may not grant are omitted."""
        limited, refused = self._without_refused_tools(spec, by)
        view = self._service().create(convert(NewAgent, limited), by=by)
        return InstalledObject(id=view.id, refused_tools=refused, warnings=self._model_warnings(view))

    def read_fields(self, ids: Sequence[str]) -> Mapping[str, Json]:
        """Return the fields that an agent's owner may set, keyed by agent id."""
        return {row.id: _owner_fields(row) for row in Agent.select().where(LIVING & Agent.id.in_(list(ids)))}

    def lock(self, ids: Sequence[str]) -> None:
        """Lock the agents until the unit of work ends."""
        list(locked(Agent.select(Agent.id).where(Agent.id.in_(list(ids))).order_by(Agent.id)))

    def update(self, agent_id: str, fields: Json, by: Principal) -> None:
        """Change an agent. The agent keeps its tools, but gets no new tools that the caller may not grant."""
        given = {name: DEFAULTS.get(name) if value is None else value for name, value in fields.items()}
        self._service().update(
            agent_id,
            convert(AgentPatch, self._without_refused_tools(given, by, Agent.get_by_id(agent_id).enabled_tools)[0]),
            ANY_VERSION,
            by=by,
        )

    def find_uses(self, ids: Sequence[str]) -> Sequence[ObjectUse]:
        """Return the agents whose diffs are reviewed by one of the agents in `ids`."""
        found: Any = Agent.select(Agent.id, Agent.name, Agent.review_policy)
        rows = found.where(LIVING & Agent.review_policy.is_null(False)).tuples()
        reviewers = ((agent_id, name, policy["reviewer_agent_id"]) for agent_id, name, policy in rows)
        return [ObjectUse(id=agent_id, name=name, uses=uses) for agent_id, name, uses in reviewers if uses in ids]

    def find_running(self, ids: Sequence[str]) -> Sequence[str]:
        """Return the subset of `ids` whose agents are started."""
        rows: Any = (
            Agent.select(Agent.id).where(LIVING & Agent.id.in_(list(ids)) & (Agent.status != "offline")).tuples()
        )
        return [str(row[0]) for row in rows]

    def remove(self, agent_id: str, by: Principal) -> None:
        """Delete an agent."""
        self._service().delete(agent_id, ANY_VERSION, force=False, by=by)

    def export(self, agent_id: str, by: Principal) -> Json:
        """Return the configuration of an agent as a template.

        The template omits the worker, because each worker exists in only one installation.
        """
        values = _owner_fields(find_readable_agent(agent_id, by))
        del values["worker_selector"]
        return {name: value for name, value in values.items() if name == "name" or value != DEFAULTS[name]}

    def _model_warnings(self, agent: AgentView) -> list[str]:
        """Return a warning if the agent has no usable model, or uses the echo model only because no model was set."""
        llm = self._service().llm
        if llm is None:
            return []
        own = llm.models_for_agent(agent.llm_provider, agent.llm_model, ())[0]
        if own.problem is not None:
            return [f"it needs a model. {own.problem}"]
        if own.name == ECHO and agent.llm_model is None:
            return [f"it needs a model: without a model, {ECHO} only repeats its input. {SET_MODEL}"]
        return []

    def _without_refused_tools(self, fields: Json, by: Principal, known: Sequence[str] = ()) -> tuple[Json, list[str]]:
        """Return an agent's fields without the tools that the caller may not grant, and a list of the removed tools.

        The tools in `known`, which the agent already has, are kept.
        """
        refused = self._refused_tools([tool for tool in fields.get("enabled_tools", ()) if tool not in known], by)
        limited = dict(fields)
        if refused:
            limited["enabled_tools"] = [tool for tool in fields["enabled_tools"] if tool not in refused]
        if refused and "tool_policy" in fields:
            limited["tool_policy"] = {tool: each for tool, each in fields["tool_policy"].items() if tool not in refused}
        return limited, refused

    def _refused_tools(self, tools: Sequence[str], by: Principal) -> list[str]:
        if self.tools is None:
            return []
        refused = []
        for tool in tools:
            try:
                self.tools.refuse_missing_permissions(by, enabled=[tool], policy={}, before={})
            except Forbidden:
                refused.append(tool)
        return refused

    def _service(self) -> AgentManagement:
        assert self.management is not None
        return self.management


def _owner_fields(row: Agent) -> Json:
    return {
        **{name: getattr(row, name) for name in COPIED},
        "review_policy": row.review_policy or NO_REVIEW,
        "worker_selector": worker_selector_view(row),
        "monthly_budget_usd": usd_of(row.monthly_budget_micro),
        "max_cost_per_task_usd": usd_of(row.max_cost_per_task_micro),
    }


@functools.cache
def _schema() -> Json:
    """Return the JSON Schema of a new agent.

    The schema omits the worker, because each worker exists in only one installation.
    """
    schema = msgspec.json.schema(NewAgent)
    fields: Json = schema["$defs"]["NewAgent"]["properties"]
    del fields["worker_id"]
    for name, value in DEFAULTS.items():
        fields[name] = {**fields[name], "default": value}
    return schema
