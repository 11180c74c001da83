"""Lists tools, and stores the values with which admins override tool definitions."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid, NotFound
from corral.http.answers import IfMatch
from corral.http.page import Page, paginate_names
from corral.plugin import Audit, AuditEntry
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.tools.api import RISKS, includes_tools
from corral_plugins.tools.models import ToolRow
from corral_plugins.tools.service.decision import NO_CONFIG, rule_of
from corral_plugins.tools.service.registry import RegisteredTool, ToolRegistry
from corral_plugins.tools.shapes import ToolPatch, ToolQuery, ToolView

DEFINED = (
    *("name", "title", "description", "runs", "schema", "output_schema"),
    *("untrusted_output", "idempotent", "config_schema"),
)


class ToolListing:
    """The service that lists and changes tools. Its methods run in the caller's unit of work."""

    agents: Agents | None
    audit: Audit | None

    def __init__(self, registry: ToolRegistry) -> None:
        self._registry = registry

    def list_tools(self, query: ToolQuery, by: Principal) -> Page[ToolView]:
        """List the tools that match the filters, sorted by name."""
        agent = self._find_agent(query.agent_id)
        found = [
            tool
            for tool in self._registry.list_tools()
            if (query.risk is UNSET or tool.risk in query.risk)
            and query.source in (UNSET, tool.source)
            and query.runs in (UNSET, tool.definition.runs)
        ]
        return paginate_names(
            found,
            query,
            by,
            scope="tools",
            name=lambda tool: tool.definition.name,
            make=lambda shown: [tool_view(tool, agent) for tool in shown],
        )

    def get_tool(self, name: str, agent_id: Any = UNSET) -> ToolView:
        """Return a tool. Raise `NotFound` if there is no tool with this name."""
        return tool_view(self._find_tool(name), self._find_agent(agent_id))

    def change_tool(self, name: str, patch: ToolPatch, match: IfMatch, *, by: Principal) -> ToolView:
        """Change the overrides of a tool. Null restores the value of the tool definition.

        Raise `Conflict` if another request changed the tool in the meantime, or `Invalid` if a value is not allowed.
        """
        tool = self._find_tool(name)
        before = tool.overrides
        match.check(before.version)
        given = {field: value for field in patch.__struct_fields__ if (value := getattr(patch, field)) is not UNSET}
        if not given:
            return tool_view(tool, None)
        self._check_patch(tool, patch)
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
                "The tool was changed in the meantime; fetch it again and repeat the change.", current_status="changed"
            )
        if self.audit is not None:
            changes = {field: (getattr(before, field), value) for field, value in given.items()}
            entry = AuditEntry(action="tools.tool.update", object_type="tool", object_id=name, changes=changes)
            self.audit.record(entry)
        return tool_view(self._find_tool(name), None)

    @staticmethod
    def _check_patch(tool: RegisteredTool, patch: ToolPatch) -> None:
        is_lowered = isinstance(patch.risk, str) and RISKS.index(patch.risk) < RISKS.index(tool.definition.risk)
        if is_lowered and not tool.is_foreign:
            detail = f"The risk of this tool is {tool.definition.risk} and can only be raised."
            raise Invalid.at("/risk", "not_allowed", detail)
        if isinstance(patch.config, dict):
            schema = tool.definition.config_schema or NO_CONFIG
            faults = json_schema_errors(schema, patch.config, pointer_prefix="/config")
            if faults:
                raise Invalid(
                    f"The configuration has {len(faults)} problem{'' if len(faults) == 1 else 's'}.", errors=faults
                )

    def _find_tool(self, name: str) -> RegisteredTool:
        tool = self._registry.find_tool(name)
        if tool is None:
            raise NotFound("There is no tool with this name.")
        return tool

    def _find_agent(self, agent_id: Any) -> AgentFacts | None:
        if not isinstance(agent_id, str):
            return None
        agent = self.agents.find(agent_id.lower()) if self.agents is not None else None
        if agent is None:
            detail = "There is no agent with this id."
            raise Invalid.at("/query/agent_id", "unknown_reference", detail, problem="unknown_reference")
        return agent


def tool_view(tool: RegisteredTool, agent: AgentFacts | None) -> ToolView:
    """Build the response body for a tool.

    If an agent is given, the body contains the tool's policy for an untainted run of this agent.
    """
    policy = None
    if agent is not None:
        is_usable = tool.overrides.enabled and tool.accepted and includes_tools(agent.enabled_tools, [tool.name])
        policy = (rule_of(agent.tool_policy, tool.name).policy or tool.default_policy) if is_usable else "deny"
    defined: dict[str, Any] = {name: getattr(tool.definition, name) for name in DEFINED}
    return ToolView(
        **defined,
        version=tool.overrides.version,
        risk=tool.risk,
        default_policy=tool.default_policy,
        enabled=tool.overrides.enabled,
        source=tool.source,
        timeout_seconds=tool.timeout_seconds,
        config=dict(tool.config),
        definition_sha256=tool.definition_sha256,
        accepted=tool.accepted,
        policy=policy,
        workers=list(tool.workers),
    )
