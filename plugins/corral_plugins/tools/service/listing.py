"""Lists tools for people, and changes their overrides for admins."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid, NotFound
from corral.http.answers import IfMatch
from corral.http.page import Page, paginate_names
from corral.plugin import Audit, AuditEntry
from corral.schema.data import json_schema_problems
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.tools.api import RISKS
from corral_plugins.tools.models import ToolRow
from corral_plugins.tools.service.decision import matches, rule_of
from corral_plugins.tools.service.decision_context import NO_CONFIG
from corral_plugins.tools.service.registry import RegisteredTool, Registry
from corral_plugins.tools.shapes import ToolPatch, ToolQuery, ToolView


class ToolListing:
    """Lists and changes tools inside the caller's unit."""

    agents: Agents | None
    audit: Audit | None

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def page(self, query: ToolQuery, by: Principal) -> Page[ToolView]:
        """List tools by name."""
        agent = self._agent(query.agent_id)
        found = [
            registered
            for registered in self._registry.all()
            if (query.risk is UNSET or registered.risk in query.risk)
            and query.source in (UNSET, registered.source)
            and query.runs in (UNSET, registered.tool.runs)
        ]
        return paginate_names(
            found,
            query,
            by,
            scope="tools",
            name=lambda registered: registered.tool.name,
            make=lambda shown: [view(registered, agent) for registered in shown],
        )

    def one(self, name: str, agent_id: Any = UNSET) -> ToolView:
        """Return a tool. Raises `NotFound`."""
        return view(self._found(name), self._agent(agent_id))

    def change(self, name: str, patch: ToolPatch, match: IfMatch, *, by: Principal) -> ToolView:
        """Change the overrides of a tool; null restores the value of its definition."""
        registered = self._found(name)
        before = registered.overrides
        match.check(before.version)
        given = {field: value for field in patch.__struct_fields__ if (value := getattr(patch, field)) is not UNSET}
        if not given:
            return view(registered, None)
        self._check(registered, patch)
        values = {**given, "version": before.version + 1, "updated_at": clock.now(), "updated_by": by.user_id}
        if before.version == 1:
            ToolRow.insert(name=name, **values).on_conflict_ignore().execute()
            mine = (ToolRow.updated_at == values["updated_at"]) & (ToolRow.updated_by == by.user_id)
            changed = ToolRow.select().where((ToolRow.name == name) & mine).exists()
        else:
            unchanged = (ToolRow.name == name) & (ToolRow.version == before.version)
            changed = bool(ToolRow.update(values).where(unchanged).execute())
        if not changed:
            raise Conflict(
                "The tool was changed by another request; read it again and retry.", current_status="changed"
            )
        if self.audit is not None:
            changes = {field: (getattr(before, field), value) for field, value in given.items()}
            entry = AuditEntry(action="tools.tool.update", object_type="tool", object_id=name, changes=changes)
            self.audit.record(entry)
        return view(self._found(name), None)

    @staticmethod
    def _check(registered: RegisteredTool, patch: ToolPatch) -> None:
        is_lowered = isinstance(patch.risk, str) and RISKS.index(patch.risk) < RISKS.index(registered.tool.risk)
        if is_lowered and registered.source != "worker":
            detail = f"The risk of this tool is {registered.tool.risk} and can only be raised."
            raise Invalid.at("/risk", "not_allowed", detail)
        if isinstance(patch.config, dict):
            schema = registered.tool.config_schema or NO_CONFIG
            faults = json_schema_problems(schema, patch.config, pointer_prefix="/config")
            if faults:
                raise Invalid(f"The configuration has {len(faults)} problems.", errors=faults)

    def _found(self, name: str) -> RegisteredTool:
        registered = self._registry.find(name)
        if registered is None:
            raise NotFound("There is no tool with this name.")
        return registered

    def _agent(self, agent_id: Any) -> AgentFacts | None:
        if not isinstance(agent_id, str):
            return None
        agent = self.agents.facts(agent_id.lower()) if self.agents is not None else None
        if agent is None:
            detail = "There is no such agent."
            raise Invalid.at("/query/agent_id", "unknown_reference", detail, problem="unknown_reference")
        return agent


def view(registered: RegisteredTool, agent: AgentFacts | None) -> ToolView:
    """Build the public shape of a tool, with its policy for an agent whose run is not tainted."""
    tool, policy = registered.tool, None
    if agent is not None:
        is_usable = registered.overrides.enabled and matches(agent.enabled_tools, tool.name)
        policy = (rule_of(agent.tool_policy, tool.name).policy or registered.default_policy) if is_usable else "deny"
    return ToolView(
        name=tool.name,
        version=registered.overrides.version,
        title=tool.title,
        description=tool.description,
        risk=registered.risk,
        runs=tool.runs,
        schema=tool.schema,
        output_schema=tool.output_schema,
        default_policy=registered.default_policy,
        enabled=registered.overrides.enabled,
        source=registered.source,
        untrusted_output=tool.untrusted_output,
        idempotent=tool.idempotent,
        timeout_seconds=registered.timeout_seconds,
        config=dict(registered.config),
        config_schema=tool.config_schema,
        definition_sha256=registered.definition_sha256,
        policy=policy,
        workers=list(registered.workers),
    )
